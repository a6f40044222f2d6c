// The passes over a row of K scores, in float32 (SIMD, for float32, bfloat16 and float16 logits) or in float64.
// diffusion_rows.h says what each does.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "convert.h"
#include "dispatch.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace vqfast {

// While one lives, this thread's results below the smallest normal number are 0: else each would cost a hundred cycles,
// and sharp logits have many.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

class FloatPasses {
 public:
  typedef float Real;
  explicit FloatPasses(vqfast_dtype dtype) : dtype_(dtype), size_(element_size(dtype)), isa_(kernels()) {}

  int64_t padded(int64_t K) const { return (K + isa_.lanes - 1) / isa_.lanes * isa_.lanes; }
  int64_t size() const { return size_; }
  float load(const void *row, int64_t K, float *scores) const { return isa_.load_scores(dtype_, row, K, scores); }
  double exp(float *scores, int64_t n, float largest, double temperature, double *sums, const char *next) const {
    // At most 1e30: the largest score minus itself, times infinity, would be NaN.
    return isa_.exp_scores(scores, n, largest, (float)std::min(1 / temperature, 1e30), sums, next, (int)size_);
  }
  double log1p(const float *weights, int64_t n, double ratio, const float *noise, const float *inverse, float *shares,
               double *curvature) const {
    return isa_.log1p_scores(weights, n, (float)ratio, noise, inverse, shares, curvature);
  }
  void grad(float *weights, int64_t n, double base, double slope, const float *shares) const {
    isa_.grad_scores(weights, n, (float)base, (float)slope, shares);
  }
  void store(const float *scores, int64_t K, void *row, bool past_caches) const {
    isa_.store_scores(dtype_, scores, K, row, past_caches);
  }
  float guide(const void *row, int64_t K, double guidance, float *scores) const {
    return isa_.guide_scores(dtype_, row, K, (float)guidance, scores);
  }
  int64_t count(const float *scores, int64_t n, float least) const { return isa_.count_scores(scores, n, least); }
  double mass(const float *scores, const float *weights, int64_t n, float least) const {
    return isa_.mass_scores(scores, weights, n, least);
  }
  void keep(float *scores, float *weights, int64_t n, float least) const {
    isa_.keep_scores(scores, weights, n, least);
  }
  double sum(const float *weights, int64_t n, double *sums) const { return isa_.sum_scores(weights, n, sums); }
  void mix(float *scores, int64_t n, float largest, double offset, const float *log_noise, double log_spread,
           double shift) const {
    isa_.mix_scores(scores, n, largest, (float)offset, log_noise, (float)log_spread, (float)shift);
  }
  void share(const float *weights, float *grads, int64_t n, double spread, const float *noise, double *given,
             double *moved) const {
    isa_.share_scores(weights, grads, n, (float)spread, noise, given, moved);
  }
  void subtract(const float *weights, float *grads, int64_t n, double by) const {
    isa_.subtract_scores(weights, grads, n, (float)by);
  }

 private:
  FlushSubnormals flush_;
  vqfast_dtype dtype_;
  int64_t size_;
  const Kernels &isa_;
};

class DoublePasses {
 public:
  typedef double Real;
  explicit DoublePasses(vqfast_dtype) {}

  int64_t padded(int64_t K) const { return K; }
  int64_t size() const { return 8; }
  double load(const void *row, int64_t K, double *scores) const {
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < K; ++k) {
      scores[k] = ((const double *)row)[k];
      largest = scores[k] > largest ? scores[k] : largest;
    }
    return largest;
  }
  double exp(double *scores, int64_t n, double largest, double temperature, double *sums, const char *) const {
    double total = 0;
    for (int64_t first = 0; first < n; first += kBlockCodes) {
      double block = 0;
      for (int64_t k = first; k < std::min(first + kBlockCodes, n); ++k)
        block += scores[k] = std::exp((scores[k] - largest) / temperature);
      total += *sums++ = block;
    }
    return total;
  }
  double log1p(const double *weights, int64_t n, double ratio, const double *noise, const double *inverse,
               double *shares, double *curvature) const {
    double logs = 0, total = 0;
    for (int64_t k = 0; k < n; ++k) {
      const double first = ratio * weights[k], r = inverse ? first * inverse[k] : first;
      logs += (noise ? noise[k] : 1) * (std::log1p(r) - r);
      if (!shares) continue;
      shares[k] = r / (1 + r);
      total += first * shares[k];
    }
    if (shares) *curvature = total;
    return logs;
  }
  void grad(double *weights, int64_t n, double base, double slope, const double *shares) const {
    for (int64_t k = 0; k < n; ++k) weights[k] *= shares ? base + slope * shares[k] : base;
  }
  void store(const double *scores, int64_t K, void *row, bool) const { std::copy(scores, scores + K, (double *)row); }
  double guide(const void *row, int64_t K, double guidance, double *scores) const {
    constexpr double kNever = -std::numeric_limits<double>::infinity();
    double largest = kNever;
    for (int64_t k = 0; k < K; ++k) {
      const double other = ((const double *)row)[k];
      scores[k] = scores[k] == kNever || other == kNever ? kNever : other + guidance * (scores[k] - other);
      largest = scores[k] > largest ? scores[k] : largest;
    }
    return largest;
  }
  int64_t count(const double *scores, int64_t n, double least) const {
    return std::count_if(scores, scores + n, [=](double v) { return v >= least; });
  }
  double mass(const double *scores, const double *weights, int64_t n, double least) const {
    double total = 0;
    for (int64_t first = 0; first < n; first += kBlockCodes) {
      double block = 0;
      for (int64_t k = first; k < std::min(first + kBlockCodes, n); ++k) block += scores[k] >= least ? weights[k] : 0;
      total += block;
    }
    return total;
  }
  void keep(double *scores, double *weights, int64_t n, double least) const {
    for (int64_t k = 0; k < n; ++k) {
      if (scores[k] >= least) continue;
      scores[k] = -std::numeric_limits<double>::infinity();
      weights[k] = 0;
    }
  }
  double sum(const double *weights, int64_t n, double *sums) const {
    double total = 0;
    for (int64_t first = 0; first < n; first += kBlockCodes) {
      double block = 0;
      for (int64_t k = first; k < std::min(first + kBlockCodes, n); ++k) block += weights[k];
      total += *sums++ = block;
    }
    return total;
  }
  void mix(double *scores, int64_t n, double largest, double offset, const double *log_noise, double log_spread,
           double shift) const {
    constexpr double kNever = -std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < n; ++k) {
      const double predicted = (scores[k] - largest) + offset;
      const double drawn = log_noise ? log_spread + log_noise[k] : log_spread;
      const double more = std::max(predicted, drawn), less = std::min(predicted, drawn);
      scores[k] = (less == kNever ? more : more + std::log1p(std::exp(less - more))) + shift;
    }
  }
  void share(const double *weights, double *grads, int64_t n, double spread, const double *noise, double *given,
             double *moved) const {
    *given = *moved = 0;
    for (int64_t k = 0; k < n; ++k) {
      const double drawn = noise ? spread * noise[k] : spread;
      *given += grads[k];
      if (drawn != 0) grads[k] *= weights[k] / (weights[k] + drawn);
      *moved += grads[k];
    }
  }
  void subtract(const double *weights, double *grads, int64_t n, double by) const {
    for (int64_t k = 0; k < n; ++k) grads[k] -= by * weights[k];
  }
};

// Calls body(passes type): FloatPasses or DoublePasses; VQFAST_BAD_DTYPE for an unknown dtype.
template <class Body>
int with_passes(vqfast_dtype dtype, Body body) {
  switch (dtype) {
    case VQFAST_F64:
      return body((DoublePasses *)nullptr);
    case VQFAST_F32:
    case VQFAST_BF16:
    case VQFAST_F16:
      return body((FloatPasses *)nullptr);
  }
  return VQFAST_BAD_DTYPE;
}

}  // namespace vqfast
