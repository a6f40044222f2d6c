// Log-probabilities of a reverse step and their gradient: one read of the logits, one write of the result.
// kernels/posterior/README.md derives the formulas.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "buffer.h"
#include "convert.h"
#include "diffusion_chain.h"
#include "dispatch.h"
#include "pages.h"
#include "score_passes.h"
#include "vqfast.h"

namespace vqfast {
namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();

double log_sum(double a, double b) {
  const double more = std::max(a, b), less = std::min(a, b);
  return less == kNever ? more : more + std::log1p(std::exp(less - more));
}

// What a thread works in: two rows of scores, and a number a block of codes.
template <class Real>
struct Scratch {
  Buffer<Real> scores, weights;
  Buffer<double> sums;

  explicit Scratch(int64_t padded)
      : scores(buffer<Real>(padded)), weights(buffer<Real>(padded)), sums(buffer<double>(padded / kBlockCodes + 1)) {}
  explicit operator bool() const { return scores && weights && sums; }
};

template <class Passes>
struct Tokens {
  const void *logits;
  const int64_t *x_t, *t, *s;
  vqfast_levels chain;
  int64_t B, L, K;
  bool marginal;

  typedef typename Passes::Real Real;

  int64_t width() const { return K + (chain.columns == 2); }
  Step step(int64_t n) const { return step_of(chain, t[n / L], s[n / L], x_t[n], K, marginal); }

  // Scores of x_0, as the rule makes them, and weights exp(scores - largest). Returns the sum of the weights, NaN or 0
  // where the scores are no distribution.
  double weigh(const Passes &passes, int64_t n, const Step &step, const Scratch<Real> &scratch, Real &largest) const {
    const char *row = (const char *)logits + n * K * passes.size();
    Real *scores = scratch.scores.get();
    largest = passes.load(row, K, scores);
    if (step.shift != 0) {
      Real &seen = scores[x_t[n]];
      const bool was_largest = seen == largest;
      seen -= (Real)step.shift;
      if (was_largest) largest = *std::max_element(scores, scores + K);
    }
    std::copy(scores, scores + passes.padded(K), scratch.weights.get());
    return passes.exp(scratch.weights.get(), passes.padded(K), largest, 1, scratch.sums.get(), row + K * passes.size());
  }

  // Calls row(passes, n, scratch) for every token. `make`(m) is what the table holds of each code's noise m; given to
  // `row` as null where all have the same.
  template <class Make, class Row>
  int run(vqfast_dtype dtype, Make make, Row row) const {
    const int64_t padded = Passes(dtype).padded(K);
    const Buffer<Real> noise = buffer<Real>(chain.noise ? padded : 0);
    bool enough = (bool)noise;
    for (int64_t k = 0; chain.noise && noise && k < padded; ++k) noise[k] = (Real)make(k < K ? chain.noise[k] : 0);
#pragma omp parallel reduction(&& : enough) if (B * L * K > kParallelElements)
    {
      const Passes passes(dtype);
      const Scratch<Real> scratch(padded);
      enough = enough && scratch;
#pragma omp for schedule(static)
      for (int64_t n = 0; n < B * L; ++n)
        if (enough) row(passes, n, scratch, chain.noise ? noise.get() : nullptr);
    }
    return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
  }
};

template <class Passes>
struct Posterior : Tokens<Passes> {
  typedef typename Passes::Real Real;
  void *log_p;

  void row(const Passes &passes, int64_t n, const Scratch<Real> &scratch, const Real *log_noise,
           bool past_caches) const {
    const Step step = this->step(n);
    Real *scores = scratch.scores.get();
    if (step.certain) {
      std::fill(scores, scores + this->K, -std::numeric_limits<Real>::infinity());
      scores[this->x_t[n]] = 0;
    } else {
      predict(passes, n, step, scratch, log_noise);
    }
    char *out = (char *)log_p + n * this->width() * passes.size();
    passes.store(scores, this->K, out, past_caches);
    if (this->chain.columns == 2) {
      scores[0] = step.masked ? (Real)std::log(1 - step.flip) : -std::numeric_limits<Real>::infinity();
      passes.store(scores, 1, out + this->K * passes.size(), false);
    }
  }

  void predict(const Passes &passes, int64_t n, const Step &step, const Scratch<Real> &scratch,
               const Real *log_noise) const {
    Real *scores = scratch.scores.get(), largest;
    const int64_t seen = this->x_t[n], padded = passes.padded(this->K);
    const double total = this->weigh(passes, n, step, scratch, largest);
    if (!(total > 0)) {
      std::fill(scores, scores + padded, std::numeric_limits<Real>::quiet_NaN());
      return;
    }
    const double offset = std::log(step.signal) - std::log(total);
    const double log_spread = std::log(log_noise ? step.spread : step.spread / (double)this->K);
    if (step.masked) {
      passes.mix(scores, padded, largest, offset, log_noise, log_spread, std::log(step.flip));
      return;
    }
    const double predicted = (double)scores[seen] - largest + offset;
    const double at_seen = log_sum(predicted, std::log(step.spread * noise_of(this->chain, seen, this->K)));
    const double normaliser = std::log(step.move + step.stay * std::exp(at_seen));
    passes.mix(scores, padded, largest, offset, log_noise, log_spread, std::log(step.move) - normaliser);
    scores[seen] = (Real)(std::log(step.move + step.stay) - normaliser + at_seen);
  }

  int run(vqfast_dtype dtype) const {
    const int64_t bytes = this->B * this->L * this->width() * element_size(dtype);
    prefer_large_pages(log_p, bytes);
    return Tokens<Passes>::run(
        dtype, [](double m) { return std::log(m); },
        [&](const Passes &passes, int64_t n, const Scratch<Real> &scratch, const Real *noise) {
          row(passes, n, scratch, noise, bytes > kLargeResult);
        });
  }
};

template <class Passes>
struct Gradient : Tokens<Passes> {
  typedef typename Passes::Real Real;
  const void *grad;
  void *grad_logits;

  void row(const Passes &passes, int64_t n, const Scratch<Real> &scratch, const Real *noise, bool past_caches) const {
    const Step step = this->step(n);
    const int64_t seen = this->x_t[n], padded = passes.padded(this->K);
    Real *grads = scratch.scores.get();  // scores are not read again once they are weighed
    char *out = (char *)grad_logits + n * this->K * passes.size();
    if (step.certain) {
      std::memset(out, 0, this->K * passes.size());
      return;
    }
    Real largest;
    const double total = this->weigh(passes, n, step, scratch, largest);
    passes.load((const char *)grad + n * this->width() * passes.size(), this->K, grads);
    std::fill(grads + this->K, grads + padded, (Real)0);
    if (!(total > 0)) {
      std::fill(grads, grads + padded, std::numeric_limits<Real>::quiet_NaN());
      passes.store(grads, this->K, out, past_caches);
      return;
    }
    // Weights are the prediction times `total`; so is the noise that they are compared with.
    const double scale = total / step.signal, spread = step.spread * scale;
    const Real *weights = scratch.weights.get();
    double given, moved, at_seen = 0;
    passes.share(weights, grads, padded, noise ? spread : spread / (double)this->K, noise, &given, &moved);
    if (!step.masked) {
      const double predicted = step.signal * weights[seen] / total;
      const double both = predicted + step.spread * noise_of(this->chain, seen, this->K);
      at_seen = given * step.stay * predicted / (step.move + step.stay * both);
    }
    passes.subtract(weights, grads, padded, (moved - at_seen) / total);
    if (!step.masked) grads[seen] -= (Real)at_seen;
    passes.store(grads, this->K, out, past_caches);
  }

  int run(vqfast_dtype dtype) const {
    const int64_t bytes = this->B * this->L * this->K * element_size(dtype);
    prefer_large_pages(grad_logits, bytes);
    return Tokens<Passes>::run(
        dtype, [](double m) { return m; },
        [&](const Passes &passes, int64_t n, const Scratch<Real> &scratch, const Real *noise) {
          row(passes, n, scratch, noise, bytes > kLargeResult);
        });
  }
};

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_posterior(vqfast_dtype dtype, const void *logits, const int64_t *x_t, const int64_t *t,
                                    const int64_t *s, vqfast_levels levels, int64_t B, int64_t L, int64_t K,
                                    int marginal, void *log_p) {
  return with_passes(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> Passes;
    return Posterior<Passes>{{logits, x_t, t, s, levels, B, L, K, marginal != 0}, log_p}.run(dtype);
  });
}

extern "C" int vqfast_cpu_posterior_backward(vqfast_dtype dtype, const void *grad, const void *logits,
                                             const int64_t *x_t, const int64_t *t, const int64_t *s,
                                             vqfast_levels levels, int64_t B, int64_t L, int64_t K, int marginal,
                                             void *grad_logits) {
  return with_passes(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> Passes;
    return Gradient<Passes>{{logits, x_t, t, s, levels, B, L, K, marginal != 0}, grad, grad_logits}.run(dtype);
  });
}
