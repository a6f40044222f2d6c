// Passes over one row of K scores, kept in a scratch row of floats between them. `n` is K rounded up to whole vectors;
// the scores behind K are -infinity, so that they weigh nothing.
#pragma once

#include "dispatch.h"
#include "simd_elements.h"
#include "simd_math.h"

namespace vqfast::VQFAST_ISA {

template <class T>
static float load_scores_of(const T *row, int64_t K, float *scores) {
  const vf never = splat(-__builtin_inff());
  vf a = never, b = never;
  int64_t k = 0;
  for (; k + 2 * kLanes <= K; k += 2 * kLanes) {
    const vf v = load(row + k), w = load(row + k + kLanes);
    store(scores + k, v);
    store(scores + k + kLanes, w);
    a = max(v, a);
    b = max(w, b);
  }
  for (; k + kLanes <= K; k += kLanes) {
    const vf v = load(row + k);
    store(scores + k, v);
    a = max(v, a);
  }
  if (const int left = K - k) {
    store(scores + k, never);
    store_part(scores + k, load_part(row + k, left), left);
    b = max(load(scores + k), b);
  }
  float lane[kLanes], largest = -__builtin_inff();
  store(lane, max(a, b));
  for (int i = 0; i < kLanes; ++i) largest = lane[i] > largest ? lane[i] : largest;
  return largest;
}

// Copies a row of logits and returns the largest; NaN is passed over.
static float load_scores(vqfast_dtype dtype, const void *row, int64_t K, float *scores) {
  switch (dtype) {
    case VQFAST_BF16:
      return load_scores_of((const bf16 *)row, K, scores);
    case VQFAST_F16:
      return load_scores_of((const f16 *)row, K, scores);
    default:
      return load_scores_of((const float *)row, K, scores);
  }
}

// scores = exp((scores - largest) factor). Returns their sum; sums[i] is that of codes i kBlockCodes and on.
// Meanwhile it asks for the memory of the row of logits that is read next, of element_size bytes each.
static double exp_scores(float *scores, int64_t n, float largest, float factor, double *sums, const char *next,
                         int element_size) {
  const vf top = splat(largest), by = splat(factor);
  double total = 0;
  for (int64_t first = 0; first < n; first += kBlockCodes) {
    const int64_t end = first + kBlockCodes < n ? first + kBlockCodes : n;
    for (int line = 0; line < element_size; ++line) __builtin_prefetch(next + first * element_size + line * 64);
    vf block = {};
    for (int64_t k = first; k < end; k += kLanes) {
      const vf weight = exp((load(scores + k) - top) * by);
      store(scores + k, weight);
      block += weight;
    }
    total += *sums++ = sum(block);
  }
  return total;
}

template <bool kVector, bool kShares>
static double log1p_scores_of(const float *weights, int64_t n, float ratio, const float *noise, const float *inverse,
                              float *shares, double *curvature) {
  const vf by = splat(ratio), one = splat(1.0f);
  double log_total = 0, curvature_total = 0;
  for (int64_t first = 0; first < n; first += kBlockCodes) {
    const int64_t end = first + kBlockCodes < n ? first + kBlockCodes : n;
    vf logs = {}, curvatures = {};
    for (int64_t k = first; k < end; k += kLanes) {
      const vf linear = by * load(weights + k);
      vf r = linear;
      if constexpr (kVector) r *= load(inverse + k);
      const vf u = one + r;
      if constexpr (kVector)
        logs += load(noise + k) * log1p_minus(r, u);
      else
        logs += log1p_minus(r, u);
      if constexpr (kShares) {
        const vf share = r / u;
        store(shares + k, share);
        curvatures += linear * share;
      }
    }
    log_total += sum(logs);
    if constexpr (kShares) curvature_total += sum(curvatures);
  }
  if (kShares) *curvature = curvature_total;
  return log_total;
}

// With r = ratio * weight / noise: returns the sum of noise (log(1 + r) - r) and, unless shares is null, writes
// r / (1 + r) to shares and the sum of noise (r - r / (1 + r)) to curvature. Both sums are of second order where r is
// small. noise: of each code, beside its inverse; null for 1.
static double log1p_scores(const float *weights, int64_t n, float ratio, const float *noise, const float *inverse,
                           float *shares, double *curvature) {
  const auto run = noise ? (shares ? log1p_scores_of<true, true> : log1p_scores_of<true, false>)
                         : (shares ? log1p_scores_of<false, true> : log1p_scores_of<false, false>);
  return run(weights, n, ratio, noise, inverse, shares, curvature);
}

// weights = weights (base + slope shares); shares may be null where slope is 0.
static void grad_scores(float *weights, int64_t n, float base, float slope, const float *shares) {
  const vf b = splat(base), s = splat(slope);
  if (shares) {
    for (int64_t k = 0; k < n; k += kLanes) store(weights + k, load(weights + k) * (b + s * load(shares + k)));
  } else {
    for (int64_t k = 0; k < n; k += kLanes) store(weights + k, load(weights + k) * b);
  }
}

template <class T>
static void store_scores_of(const float *scores, int64_t K, T *row) {
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) store(row + k, load(scores + k));
  if (const int left = K - k) store_part(row + k, load(scores + k), left);
}

// Past the caches, for a result that is larger than they are: the row is not read from memory before it is written.
static void stream_scores(const float *scores, int64_t K, float *row) {
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) stream(row + k, load(scores + k));
}

static void store_scores(vqfast_dtype dtype, const float *scores, int64_t K, void *row, bool past_caches) {
  switch (dtype) {
    case VQFAST_BF16:
      return store_scores_of(scores, K, (bf16 *)row);
    case VQFAST_F16:
      return store_scores_of(scores, K, (f16 *)row);
    default:
      break;
  }
  if (past_caches && (uintptr_t)row % sizeof(vf) == 0 && K % kLanes == 0)
    stream_scores(scores, K, (float *)row);
  else
    store_scores_of(scores, K, (float *)row);
}

template <class T>
static void scale_row_of(const T *, void *row, int64_t K, typename Wide<T>::scalar scale) {
  T *values = (T *)row;
  const auto factor = splat(scale);
  int64_t k = 0;
  for (; k + kWidth<T> <= K; k += kWidth<T>) store(values + k, load(values + k) * factor);
  if (const int left = K - k) store_part(values + k, load_part(values + k, left) * factor, left);
}

// row *= scale
static void scale_row(vqfast_dtype dtype, void *row, int64_t K, double scale) {
  with_element(dtype, [&](auto *type) { scale_row_of(type, row, K, scale); });
}

template <class T>
static float guide_scores_of(const T *row, int64_t K, float guidance, float *scores) {
  const vf never = splat(-__builtin_inff()), by = splat(guidance);
  vf most = never;
  for (int64_t k = 0; k < K; k += kLanes) {
    const vf score = load(scores + k), other = k + kLanes <= K ? load(row + k) : load_part(row + k, K - k);
    const vf guided = other + by * (score - other);
    // A code that either calls impossible stays so; infinities of one sign would make it NaN.
    const vf kept = score == never ? never : other == never ? never : guided;
    store(scores + k, kept);
    most = max(kept, most);
  }
  float lane[kLanes], largest = -__builtin_inff();
  store(lane, most);
  for (int i = 0; i < kLanes; ++i) largest = lane[i] > largest ? lane[i] : largest;
  return largest;
}

// scores = row + guidance (scores - row), row the unconditional scores. Returns the largest; NaN is passed over.
static float guide_scores(vqfast_dtype dtype, const void *row, int64_t K, float guidance, float *scores) {
  switch (dtype) {
    case VQFAST_BF16:
      return guide_scores_of((const bf16 *)row, K, guidance, scores);
    case VQFAST_F16:
      return guide_scores_of((const f16 *)row, K, guidance, scores);
    default:
      return guide_scores_of((const float *)row, K, guidance, scores);
  }
}

// How many scores are at least `least`.
static int64_t count_scores(const float *scores, int64_t n, float least) {
  const vf threshold = splat(least);
  vi counts = {};
  for (int64_t k = 0; k < n; k += kLanes) counts -= (vi)(load(scores + k) >= threshold);
  int32_t lane[kLanes];
  store(lane, counts);
  int64_t count = 0;
  for (int i = 0; i < kLanes; ++i) count += lane[i];
  return count;
}

// Sum of the weights whose scores are at least `least`, in the order of sum_scores.
static double mass_scores(const float *scores, const float *weights, int64_t n, float least) {
  const vf threshold = splat(least);
  double total = 0;
  for (int64_t first = 0; first < n; first += kBlockCodes) {
    const int64_t end = first + kBlockCodes < n ? first + kBlockCodes : n;
    vf block = {};
    for (int64_t k = first; k < end; k += kLanes) block += load(scores + k) >= threshold ? load(weights + k) : vf{};
    total += sum(block);
  }
  return total;
}

// Where a score is below `least` its weight becomes 0 and it -infinity.
static void keep_scores(float *scores, float *weights, int64_t n, float least) {
  const vf threshold = splat(least), never = splat(-__builtin_inff());
  for (int64_t k = 0; k < n; k += kLanes) {
    const vf score = load(scores + k);
    store(weights + k, score >= threshold ? load(weights + k) : vf{});
    store(scores + k, score >= threshold ? score : never);
  }
}

// Returns the sum of the weights; sums[i] is that of codes i kBlockCodes and on.
static double sum_scores(const float *weights, int64_t n, double *sums) {
  double total = 0;
  for (int64_t first = 0; first < n; first += kBlockCodes) {
    const int64_t end = first + kBlockCodes < n ? first + kBlockCodes : n;
    vf block = {};
    for (int64_t k = first; k < end; k += kLanes) block += load(weights + k);
    total += *sums++ = sum(block);
  }
  return total;
}

}  // namespace vqfast::VQFAST_ISA
