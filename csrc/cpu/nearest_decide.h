// What decides the rows that the scores leave open: finding the codes in question, distances in float64.
#pragma once

#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "convert.h"
#include "dispatch.h"
#include "nearest_pack.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {

// One bit a lane, of the lanes that are true.
static inline unsigned bits_of(vi lanes) {
#if VQFAST_LANES == 16
  return _mm512_movepi32_mask((__m512i)lanes);
#elif VQFAST_LANES == 8
  return (unsigned)_mm256_movemask_ps((__m256)lanes);
#elif defined(__SSE__)
  return (unsigned)_mm_movemask_ps((__m128)lanes);
#else
  unsigned bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= (lanes[l] != 0) << l;
  return bits;
#endif
}

// The largest of n scores, a multiple of kLanes, if it reaches `least`; else -infinity.
static float largest_score(const float *scores, int64_t n, float least) {
  vf top = splat(-__builtin_inff());
  for (int64_t i = 0; i < n; i += kLanes) top = max(load(scores + i), top);
  if (!bits_of(top >= splat(least))) return -__builtin_inff();
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    vi other;
    for (int l = 0; l < kLanes; ++l) other[l] = l ^ half;
    top = max(top, __builtin_shuffle(top, other));
  }
  return top[0];
}

// Positions of the scores that are at least `threshold`, in order; returns how many. n is a multiple of kLanes.
static int64_t find_scores(const float *scores, int64_t n, float threshold, int32_t *found) {
  int64_t count = 0;
  const vf least = splat(threshold);
  for (int64_t i = 0; i < n; i += kLanes)
    for (unsigned bits = bits_of(load(scores + i) >= least); bits; bits &= bits - 1)
      found[count++] = (int32_t)i + __builtin_ctz(bits);
  return count;
}

// A row in float64, times `scale`; times a power of two of its own where that is 0.
static void widen_row(vqfast_dtype dtype, const void *row, int64_t stride_feature, int64_t D, double scale,
                      double *wide) {
  with_element(dtype, [&](auto *type) {
    const auto *x = (decltype(type))row;
    const double factor = scale != 0 ? scale : scale_to_one(largest_magnitude(x, stride_feature, D));
    int64_t d = 0;
    if (stride_feature == 1)
      for (; d + kWide <= D; d += kWide) *(vdw_unaligned *)(wide + d) = widened(x + d) * factor;
    for (; d < D; ++d) wide[d] = (double)widen(x[d * stride_feature]) * factor;
  });
}

// ||row - scale code||^2, eight partial sums; the relative error is below (D + 8) 2^-53.
static double distance(vqfast_dtype dtype, const double *row, const void *code, double scale, int64_t D) {
  double sums[8] = {};
  with_element(dtype, [&](auto *type) {
    const auto *c = (decltype(type))code;
    int64_t d = 0;
    for (; d + 8 <= D; d += 8)
      for (int l = 0; l < 8; ++l) {
        const double difference = row[d + l] - scale * (double)widen(c[d + l]);
        sums[l] += difference * difference;
      }
    for (int l = 0; d + l < D; ++l) {
      const double difference = row[d + l] - scale * (double)widen(c[d + l]);
      sums[l] += difference * difference;
    }
  });
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Of the row and scale * code. The product and the square are off by less than (D + 8) 2^-53 of the magnitude and of the
// square.
static Products products(vqfast_dtype dtype, const double *row, const void *code, double scale, int64_t D) {
  double sums[3][8] = {};
  with_element(dtype, [&](auto *type) {
    const auto *c = (decltype(type))code;
    const auto take = [&](int64_t d, int l) __attribute__((always_inline)) {
      const double value = scale * (double)widen(c[d + l]), product = row[d + l] * value;
      sums[0][l] += product;
      sums[1][l] += product < 0 ? -product : product;
      sums[2][l] += value * value;
    };
    int64_t d = 0;
    for (; d + 8 <= D; d += 8)
      for (int l = 0; l < 8; ++l) take(d, l);
    for (int l = 0; d + l < D; ++l) take(d, l);
  });
  const auto sum = [](const double *s) { return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])); };
  return {sum(sums[0]), sum(sums[1]), sum(sums[2])};
}

}  // namespace vqfast::VQFAST_ISA
