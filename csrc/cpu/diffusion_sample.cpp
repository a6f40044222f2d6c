// Draws of diffusion: forward noise and the reverse step.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "buffer.h"
#include "diffusion_chain.h"
#include "diffusion_truncate.h"
#include "locate.h"
#include "philox.h"
#include "score_passes.h"
#include "vqfast.h"

namespace vqfast {
namespace {

constexpr int64_t kDrawElements = 16;  // a draw takes as long as this many elements of a pass

// The random bits of the first draw of rows begin..begin + kRandomRows - 1.
struct FirstDraws {
  int64_t begin;
  uint64_t first[kRandomRows], second[kRandomRows];

  FirstDraws(const int64_t *key, int64_t begin) : begin(begin) {
    kernels().random_rows(key[0], key[1], begin, 0, first, second);
  }
  RandomBits operator[](int64_t n) const { return {first[n - begin], second[n - begin]}; }
};

template <class Passes>
struct Reverse {
  const void *logits, *unconditional;
  const int64_t *x_t, *t, *s;
  vqfast_levels chain;
  int64_t B, L, K;
  const int64_t *known;
  bool marginal;
  double temperature, guidance;
  Truncation keep;
  const int64_t *key;
  int64_t *x_s;

  typedef typename Passes::Real Real;

  // Probabilities of x_0, up to their sum, which is returned: NaN or 0 where the scores are no distribution.
  double weigh(const Passes &passes, int64_t n, Real *weights, Real *scores, double *sums) const {
    const int64_t bytes = K * passes.size(), padded = passes.padded(K);
    const char *row = (const char *)logits + n * bytes;
    Real largest = passes.load(row, K, weights);
    if (unconditional) largest = passes.guide((const char *)unconditional + n * bytes, K, guidance, weights);
    if (!keep.any(K)) return passes.exp(weights, padded, largest, temperature, sums, row + bytes);
    std::copy(weights, weights + padded, scores);
    const double total = passes.exp(weights, padded, largest, temperature, sums, row + bytes);
    return std::isfinite(total) && total > 0 ? truncate(passes, keep, K, scores, weights, sums, total) : total;
  }

  int64_t draw(const Passes &passes, int64_t n, const RandomBits &bits, Real *weights, Real *scores,
               double *sums) const {
    const int64_t b = n / L, current = x_t[n];
    ReverseDraw draw = begin_draw(chain, t[b], s[b], current, known ? known[n] : -1, K, marginal, bits);
    if (draw.decided) return draw.x_s;

    double total = weigh(passes, n, weights, scores, sums);
    bool valid = std::isfinite(total) && total > 0;
    if (valid && draw.step.shift != 0) {
      weights[current] *= std::exp(-draw.step.shift);
      total = passes.sum(weights, passes.padded(K), sums);
      valid = total > 0;
    }
    settle_draw(draw, chain, draw.step.masked ? 0 : weights[current] / total, valid, K);
    if (draw.decided) return draw.x_s;
    return locate(weights, sums, K, uniform(philox(key[0], key[1], n, 1).first) * total);
  }

  int run(vqfast_dtype dtype) const {
    bool enough = true;
#pragma omp parallel reduction(&& : enough) if (B * L * (K + kDrawElements) > kParallelElements)
    {
      const Passes passes(dtype);
      const int64_t padded = passes.padded(K);
      const Buffer<Real> weights = buffer<Real>(padded), scores = buffer<Real>(keep.any(K) ? padded : 0);
      const Buffer<double> sums = buffer<double>(padded / kBlockCodes + 1);
      enough = enough && weights && scores && sums;
#pragma omp for schedule(static)
      for (int64_t begin = 0; begin < B * L; begin += kRandomRows) {
        if (!enough) continue;
        const FirstDraws bits(key, begin);
        for (int64_t n = begin; n < std::min(begin + kRandomRows, B * L); ++n)
          x_s[n] = draw(passes, n, bits[n], weights.get(), scores.get(), sums.get());
      }
    }
    return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
  }
};

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_q_sample(const int64_t *x0, const int64_t *t, vqfast_levels levels, int64_t B, int64_t L,
                                   int64_t K, const int64_t *key, int64_t *x_t) {
#pragma omp parallel for schedule(static) if (B * L * kDrawElements > kParallelElements)
  for (int64_t begin = 0; begin < B * L; begin += kRandomRows) {
    const FirstDraws bits(key, begin);
    const int64_t end = std::min(begin + kRandomRows, B * L);
    for (int64_t n = begin, stop; n < end; n = stop) {
      const int64_t b = n / L;
      const Shares at = shares(levels, t[b]);
      stop = std::min(end, (b + 1) * L);
      for (int64_t i = n; i < stop; ++i) x_t[i] = noised(levels, at, x0[i], bits[i], K);
    }
  }
  return VQFAST_OK;
}

extern "C" int vqfast_cpu_p_sample(vqfast_dtype dtype, const void *logits, const void *unconditional,
                                   const int64_t *x_t, const int64_t *t, const int64_t *s, vqfast_levels levels,
                                   int64_t B, int64_t L, int64_t K, const int64_t *known, int marginal,
                                   double temperature, double guidance, int64_t top_k, double top_p, const int64_t *key,
                                   int64_t *x_s) {
  return with_passes(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> Passes;
    const Reverse<Passes> reverse = {
        logits, unconditional, x_t,           t,           s,        levels,         B,   L,
        K,      known,         marginal != 0, temperature, guidance, {top_k, top_p}, key, x_s};
    return reverse.run(dtype);
  });
}
