// What decides the rows that the scores leave open: finding the codes in question, distances in float64.
#pragma once

#include "convert.h"
#include "dispatch.h"
#include "nearest_pack.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {

// One bit a lane: whether it is at least `least`.
static inline __attribute__((always_inline)) uint64_t bits_from(vf v, vf least) {
#if VQFAST_LANES == 16
  return _mm512_cmp_ps_mask((__m512)v, (__m512)least, _CMP_GE_OQ);
#elif VQFAST_LANES == 8
  return (unsigned)_mm256_movemask_ps((__m256)(v >= least));
#elif defined(__SSE__)
  return (unsigned)_mm_movemask_ps((__m128)(v >= least));
#else
  uint64_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= (uint64_t)(v[l] >= least[l]) << l;
  return bits;
#endif
}

// The largest of n scores, a multiple of kLanes, if it reaches `least`; else -infinity.
static float largest_score(const float *scores, int64_t n, float least) {
  // Several at once: a maximum waits for the one before it.
  const vf never = splat(-__builtin_inff());
  vf tops[4] = {never, never, never, never};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) tops[v] = max(load(scores + i + v * kLanes), tops[v]);
  for (; i < n; i += kLanes) tops[0] = max(load(scores + i), tops[0]);
  vf top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
  if (!bits_from(top, splat(least))) return -__builtin_inff();
  // By quarters: of the shuffles of a wide vector GCC makes more.
  typedef float quarter __attribute__((vector_size(16)));
  quarter quarters[kLanes / 4];
  __builtin_memcpy(quarters, &top, sizeof top);
  quarter four = quarters[0];
  for (int q = 1; q < kLanes / 4; ++q) four = quarters[q] > four ? quarters[q] : four;
  float largest = four[0];
  for (int l = 1; l < 4; ++l) largest = four[l] > largest ? four[l] : largest;
  return largest;
}

// Positions of the scores that are at least `threshold`, in order; returns how many. n is a multiple of kLanes.
static int64_t find_scores(const float *scores, int64_t n, float threshold, int32_t *found) {
  int64_t count = 0;
  const vf least = splat(threshold);
  const auto take = [&](int64_t i, uint64_t bits) __attribute__((always_inline)) {
    for (; bits; bits &= bits - 1) found[count++] = (int32_t)i + __builtin_ctzll(bits);
  };
  int64_t i = 0;
  // One branch for four vectors, of which few have one.
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    uint64_t bits = 0;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) bits |= bits_from(load(scores + i + v * kLanes), least) << v * kLanes;
    take(i, bits);
  }
  for (; i < n; i += kLanes) take(i, bits_from(load(scores + i), least));
  return count;
}

// A row in float64, times `scale`; times a power of two of its own where that is 0.
static void widen_row(vqfast_dtype dtype, const void *row, int64_t D, double scale, double *wide) {
  with_element(dtype, [&](auto *type) {
    const auto *x = (decltype(type))row;
    const double factor = scale != 0 ? scale : scale_to_one(largest_magnitude(x, D));
    int64_t d = 0;
    for (; d + kWide <= D; d += kWide) *(vd_unaligned *)(wide + d) = widened(x + d) * factor;
    for (; d < D; ++d) wide[d] = (double)widen(x[d]) * factor;
  });
}

// Calls take(v, row, code) for each kWide features of a row and scale * code, with v = 0..3 in turn: as many sums go on
// at once, for an addition waits for the one before it. Zeros behind the last.
template <class T, class Take>
static inline __attribute__((always_inline)) void with_features(const double *row, const T *code, double scale,
                                                                int64_t D, Take take) {
  const auto at = [&](int64_t d, int v) __attribute__((always_inline)) {
    take(v, *(const vd_unaligned *)(row + d), widened(code + d) * scale);
  };
  int64_t d = 0;
  for (; d + 4 * kWide <= D; d += 4 * kWide)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) at(d + v * kWide, v);
  for (; d + kWide <= D; d += kWide) at(d, 0);
  if (d == D) return;
  vd rest = {}, code_rest = {};
  for (int j = 0; d + j < D; ++j) rest[j] = row[d + j], code_rest[j] = (double)widen(code[d + j]);
  take(1, rest, code_rest * scale);
}

static inline double sum_of(const vd (&sums)[4]) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// ||row - scale code||^2; the relative error is below (D + 8) 2^-53, in whatever order it is summed.
static double distance(vqfast_dtype dtype, const double *row, const void *code, double scale, int64_t D) {
  vd sums[4] = {};
  with_element(dtype, [&](auto *type) {
    with_features(row, (decltype(type))code, scale, D, [&](int v, vd x, vd c) __attribute__((always_inline)) {
      const vd difference = x - c;
      sums[v] += difference * difference;
    });
  });
  return sum_of(sums);
}

// Of the row and scale * code. The product and the square are off by less than (D + 8) 2^-53 of the magnitude and of
// the square.
static Products products(vqfast_dtype dtype, const double *row, const void *code, double scale, int64_t D) {
  vd sums[3][4] = {};
  with_element(dtype, [&](auto *type) {
    with_features(row, (decltype(type))code, scale, D, [&](int v, vd x, vd c) __attribute__((always_inline)) {
      const vd product = x * c;
      sums[0][v] += product;
      sums[1][v] += product < 0 ? -product : product;
      sums[2][v] += c * c;
    });
  });
  return {sum_of(sums[0]), sum_of(sums[1]), sum_of(sums[2])};
}

}  // namespace vqfast::VQFAST_ISA
