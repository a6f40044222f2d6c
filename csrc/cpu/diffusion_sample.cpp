// Draws of uniform diffusion: forward noise and the reverse step.
#include <cmath>
#include <type_traits>

#include "buffer.h"
#include "philox.h"
#include "score_passes.h"
#include "vqfast.h"

namespace vqfast {
namespace {

constexpr int64_t kDrawElements = 32;           // a draw takes as long as this many elements of a pass

// The first code whose cumulative weight exceeds the target; the last that has any weight if rounding leaves none.
// sums[i]: of the codes i kBlockCodes and on.
template <class Real>
int64_t locate(const Real *weights, const double *sums, int64_t K, double target) {
  const int64_t blocks = (K + kBlockCodes - 1) / kBlockCodes;
  double before = 0, before_chosen = 0;
  int64_t chosen = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    if (sums[i] > 0) chosen = i, before_chosen = before;
    before += sums[i];
    if (before > target) break;
  }
  const int64_t first = chosen * kBlockCodes, end = std::min(first + kBlockCodes, K);
  int64_t drawn = first;
  double cumulative = before_chosen;
  for (int64_t k = first; k < end; ++k) {
    if (!(weights[k] > 0)) continue;
    drawn = k;
    cumulative += weights[k];
    if (cumulative > target) break;
  }
  return drawn;
}

template <class Passes>
struct Reverse {
  const void *logits;
  const int64_t *x_t, *t, *s;
  const double *alpha_bar;
  int64_t B, L, K;
  const int64_t *known;
  double temperature;
  const int64_t *key;
  int64_t *x_s;

  typedef typename Passes::Real Real;

  int64_t draw(const Passes &passes, int64_t n, Real *weights, double *sums) const {
    const int64_t b = n / L;
    const double signal = alpha_bar[s[b]], stay = alpha_bar[t[b]] / signal;
    const RandomBits bits = philox(key[0], key[1], n, 0);
    const double part = uniform(bits.first);
    const int64_t any_code = below(bits.second, K);
    if (known && known[n] >= 0) return part < signal ? known[n] : any_code;

    const double replaced = (1 - stay) * (1 - signal) / K;
    const double predicted = (1 - stay) * signal / K;
    // The weight of staying grows with p(x_t). Where even p(x_t) = 0 means to stay, as for most tokens of a long chain,
    // the logits need not be read.
    const double least = stay * (1 - signal) / K;
    if (part * (least + replaced + predicted) < least) return x_t[n];

    const char *row = (const char *)logits + n * K * passes.size();
    const Real largest = passes.load(row, K, weights);
    const double total = passes.exp(weights, passes.padded(K), largest, temperature, sums, row + K * passes.size());
    if (!(std::isfinite(total) && total > 0)) return x_t[n];
    const double kept = stay * (signal * (weights[x_t[n]] / total) + (1 - signal) / K);
    const double target = part * (kept + replaced + predicted);
    if (target < kept) return x_t[n];
    if (target < kept + replaced) return any_code;
    return locate(weights, sums, K, uniform(philox(key[0], key[1], n, 1).first) * total);
  }

  int run(vqfast_dtype dtype) const {
    bool enough = true;
#pragma omp parallel reduction(&& : enough) if (B * L * (K + kDrawElements) > kParallelElements)
    {
      const Passes passes(dtype);
      const int64_t padded = passes.padded(K);
      const Buffer<Real> weights = buffer<Real>(padded);
      const Buffer<double> sums = buffer<double>(padded / kBlockCodes + 1);
      enough = weights && sums;
#pragma omp for schedule(static)
      for (int64_t n = 0; n < B * L; ++n)
        if (enough) x_s[n] = draw(passes, n, weights.get(), sums.get());
    }
    return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
  }
};

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_uniform_q_sample(const int64_t *x0, const int64_t *t, const double *alpha_bar, int64_t,
                                           int64_t B, int64_t L, int64_t K, const int64_t *key, int64_t *x_t) {
#pragma omp parallel for schedule(static) if (B * L * kDrawElements > kParallelElements)
  for (int64_t n = 0; n < B * L; ++n) {
    const RandomBits bits = philox(key[0], key[1], n, 0);
    x_t[n] = uniform(bits.first) < alpha_bar[t[n / L]] ? x0[n] : below(bits.second, K);
  }
  return VQFAST_OK;
}

extern "C" int vqfast_cpu_uniform_p_sample(vqfast_dtype dtype, const void *logits, const int64_t *x_t,
                                           const int64_t *t, const int64_t *s, const double *alpha_bar, int64_t,
                                           int64_t B, int64_t L, int64_t K, const int64_t *known, double temperature,
                                           const int64_t *key, int64_t *x_s) {
  return with_passes(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> Passes;
    const Reverse<Passes> reverse = {logits, x_t, t, s, alpha_bar, B, L, K, known, temperature, key, x_s};
    return reverse.run(dtype);
  });
}
