// Passes of a posterior and of its gradient over one row of K scores; as in diffusion_rows.h.
#pragma once

#include "dispatch.h"
#include "simd_elements.h"
#include "simd_math.h"

namespace vqfast::VQFAST_ISA {

template <bool kNoise, bool kVector>
static void mix_scores_of(float *scores, int64_t n, float largest, float offset, const float *log_noise,
                          float log_spread, float shift) {
  const vf top = splat(largest), by = splat(offset), add = splat(shift), same = splat(log_spread);
  const vf never = splat(-__builtin_inff());
  for (int64_t k = 0; k < n; k += kLanes) {
    const vf predicted = (load(scores + k) - top) + by;
    if constexpr (!kNoise) {
      store(scores + k, predicted + add);
    } else {
      vf drawn = same;
      if constexpr (kVector) drawn += load(log_noise + k);
      const vf more = max(predicted, drawn), less = min(predicted, drawn);
      // The difference of two minus infinities would be NaN.
      const vf r = less == never ? (vf){} : exp(less - more);
      store(scores + k, more + (log1p_minus(r, r + 1.0f) + r) + add);
    }
  }
}

// scores = shift + log(exp(scores - largest + offset) + noise). log_noise: of each code, to which log_spread is added;
// null for log_spread itself. Without noise log_spread is -infinity.
static void mix_scores(float *scores, int64_t n, float largest, float offset, const float *log_noise, float log_spread,
                       float shift) {
  const auto run = log_spread == -__builtin_inff() ? mix_scores_of<false, false>
                   : log_noise                     ? mix_scores_of<true, true>
                                                   : mix_scores_of<true, false>;
  run(scores, n, largest, offset, log_noise, log_spread, shift);
}

template <bool kNoise, bool kVector>
static void share_scores_of(const float *weights, float *grads, int64_t n, float spread, const float *noise,
                            double *given, double *moved) {
  const vf by = splat(spread), least = splat(1e-37f);
  double given_total = 0, moved_total = 0;
  for (int64_t first = 0; first < n; first += kBlockCodes) {
    const int64_t end = first + kBlockCodes < n ? first + kBlockCodes : n;
    vf all = {}, through = {};
    for (int64_t k = first; k < end; k += kLanes) {
      const vf grad = load(grads + k);
      vf share = grad;
      if constexpr (kNoise) {
        const vf weight = load(weights + k);
        if constexpr (kVector) {
          const vf m = load(noise + k);
          share *= m == 0.0f ? splat(1.0f) : weight / (weight + max(by * m, least));
        } else {
          share *= weight / (weight + max(by, least));
        }
        store(grads + k, share);
      }
      all += grad;
      through += share;
    }
    given_total += sum(all);
    moved_total += sum(through);
  }
  *given = given_total;
  *moved = moved_total;
}

// grads = grads weights / (weights + spread noise); where the noise is 0 as they are. noise: of each code, null for 1.
// The sums of grads before and after.
static void share_scores(const float *weights, float *grads, int64_t n, float spread, const float *noise, double *given,
                         double *moved) {
  const auto run = spread == 0 ? share_scores_of<false, false>
                   : noise     ? share_scores_of<true, true>
                               : share_scores_of<true, false>;
  run(weights, grads, n, spread, noise, given, moved);
}

// grads -= by weights
static void subtract_scores(const float *weights, float *grads, int64_t n, float by) {
  const vf factor = splat(by);
  for (int64_t k = 0; k < n; k += kLanes) store(grads + k, load(grads + k) - factor * load(weights + k));
}

}  // namespace vqfast::VQFAST_ISA
