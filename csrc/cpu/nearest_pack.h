// Centring, scaling and rounding of vectors for the score loops. A Layout says where a value goes:
//   Layout::Value                        the packed type
//   Layout::round(values)                 kWide floats, rounded to it
//   Layout::put(packed, i, d0, m, values) stores features d0..d0+m-1, m <= kWide, of vector i; d0 is a multiple of
//   kWide
#pragma once

#include <string.h>

#include "binary_scale.h"
#include "cache.h"
#include "convert.h"
#include "score_engine.h"
#include "simd_elements.h"

namespace vqfast::VQFAST_ISA {

// Wide vectors as arguments: their convention varies with the instruction set, but all of it is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

// As many features at a time as a register has doubles: of a wider vector GCC converts one element after the other.
constexpr int kWide = VQFAST_LANES / 2;
typedef uint32_t vuw __attribute__((vector_size(2 * VQFAST_LANES)));
typedef float vfw_unaligned __attribute__((vector_size(2 * VQFAST_LANES), aligned(4), may_alias));

static inline __attribute__((always_inline)) vd widened(const double *v) { return *(const vd_unaligned *)v; }
static inline __attribute__((always_inline)) vd widened(const float *v) {
  return to_doubles(*(const vfw_unaligned *)v);
}
static inline __attribute__((always_inline)) vd widened(const bf16 *v) {
  typedef uint16_t half_unaligned __attribute__((vector_size(VQFAST_LANES), aligned(2), may_alias));
  return to_doubles((vfw)(__builtin_convertvector(*(const half_unaligned *)v, vuw) << 16));
}
static inline __attribute__((always_inline)) vd widened(const f16 *v) {
#if defined(__F16C__) && VQFAST_LANES == 16
  return to_doubles((vfw)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)v)));
#elif defined(__F16C__) && VQFAST_LANES == 8
  return to_doubles((vfw)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)v)));
#else
  vfw wide;
  for (int j = 0; j < kWide; ++j) wide[j] = widen(v[j]);
  return to_doubles(wide);
#endif
}

// The largest magnitude of a row; infinite if a value is NaN or infinite.
template <class T>
static inline __attribute__((always_inline)) double largest_magnitude(const T *row, int64_t D) {
  vd high = {}, bad = {};
  int64_t d = 0;
  for (; d + kWide <= D; d += kWide) {
    const vd v = widened(row + d), magnitude = v < 0 ? -v : v;
    high = magnitude > high ? magnitude : high;
    bad += v - v;  // NaN from the first value that is not finite
  }
  double largest = 0, broken = sum(bad);
  for (int j = 0; j < kWide; ++j) largest = high[j] > largest ? high[j] : largest;
  for (; d < D; ++d) {
    const double v = (double)widen(row[d]), magnitude = v < 0 ? -v : v;
    largest = magnitude > largest ? magnitude : largest;
    broken += v - v;
  }
  return broken == 0 ? largest : (double)INFINITY;
}

constexpr int64_t kAhead = 2;  // vectors: their memory is asked for while these are packed

// The difference and its scaling are float64; they round once, to the format (bfloat16 by way of float32).
template <class Layout>
static void pack_vectors(vqfast_dtype dtype, const void *const *vectors, int64_t n, int64_t D, const double *mean,
                         double scale, void *packed, int64_t bytes, PackedNorm *norms) {
  memset(packed, 0, bytes);
  with_element(dtype, [&](auto *type) {
    for (int64_t i = 0; i < n; ++i) {
      const auto *row = (decltype(type))vectors[i];
      if (i + kAhead < n) prefetch(vectors[i + kAhead], D * (int64_t)sizeof *row);
      const double factor = mean ? scale : scale_to_one(largest_magnitude(row, D));
      vd rounded = {}, exact = {}, residual = {};
      for (int64_t d = 0; d < D; d += kWide) {
        const int m = D - d < kWide ? (int)(D - d) : kWide;
        vd wide = {};
        if (m == kWide) {
          wide = mean ? (widened(row + d) - widened(mean + d)) * factor : widened(row + d) * factor;
        } else {
          for (int j = 0; j < m; ++j) wide[j] = ((double)widen(row[d + j]) - (mean ? mean[d + j] : 0.0)) * factor;
        }
        const vfw values = Layout::round(__builtin_convertvector(wide, vfw));
        const vd back = to_doubles(values), rest = wide - back;
        rounded += back * back;
        exact += wide * wide;
        residual += rest * rest;
        Layout::put((typename Layout::Value *)packed, i, d, m, values);
      }
      norms[i] = {sum(rounded), sum(exact), sum(residual)};
    }
  });
}

}  // namespace vqfast::VQFAST_ISA
