// Centring, scaling and rounding of vectors for the score loops. A Layout says where a value goes:
//   Layout::Value                        the packed type
//   Layout::round(eight)                 eight floats, rounded to it
//   Layout::put(packed, i, d0, m, eight) stores features d0..d0+m-1, m <= 8, of vector i; d0 is a multiple of 8
#pragma once

#include <string.h>

#include "binary_scale.h"
#include "convert.h"
#include "score_engine.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {

// Wide vectors as arguments: their convention varies with the instruction set, but all of it is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

// Eight features at a time; GCC splits the vectors where the instruction set has narrower ones.
typedef float vf8 __attribute__((vector_size(32)));
typedef uint32_t vu8 __attribute__((vector_size(32)));
typedef double vd8 __attribute__((vector_size(64)));
typedef double vd8_unaligned __attribute__((vector_size(64), aligned(8), may_alias));
typedef float vf8_unaligned __attribute__((vector_size(32), aligned(4), may_alias));

static inline __attribute__((always_inline)) vd8 eight(const double *v) { return *(const vd8_unaligned *)v; }
static inline __attribute__((always_inline)) vd8 eight(const float *v) {
  return __builtin_convertvector(*(const vf8_unaligned *)v, vd8);
}
template <class T>
static inline __attribute__((always_inline)) vd8 eight(const T *v) {
  vf8 wide;
  for (int j = 0; j < 8; ++j) wide[j] = widen(v[j]);
  return __builtin_convertvector(wide, vd8);
}

static inline __attribute__((always_inline)) double sum_of(vd8 v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// The largest magnitude of a row; infinite if a value is NaN or infinite.
template <class T>
static inline __attribute__((always_inline)) double largest_magnitude(const T *row, int64_t stride_feature, int64_t D) {
  vd8 high = {}, bad = {};
  int64_t d = 0;
  if (stride_feature == 1)
    for (; d + 8 <= D; d += 8) {
      const vd8 v = eight(row + d), magnitude = v < 0 ? -v : v;
      high = magnitude > high ? magnitude : high;
      bad += v - v;  // NaN from the first value that is not finite
    }
  double largest = 0, broken = sum_of(bad);
  for (int j = 0; j < 8; ++j) largest = high[j] > largest ? high[j] : largest;
  for (; d < D; ++d) {
    const double v = (double)widen(row[d * stride_feature]), magnitude = v < 0 ? -v : v;
    largest = magnitude > largest ? magnitude : largest;
    broken += v - v;
  }
  return broken == 0 ? largest : (double)INFINITY;
}

// The difference and its scaling are float64; they round once, to the format (bfloat16 by way of float32).
template <class Layout>
static void pack_vectors(vqfast_dtype dtype, const void *rows, int64_t stride_row, int64_t stride_feature, int64_t n,
                         int64_t D, const double *mean, double scale, void *packed, int64_t bytes,
                         PackedNorm *norms) {
  memset(packed, 0, bytes);
  with_element(dtype, [&](auto *type) {
    const auto *base = (decltype(type))rows;
    for (int64_t i = 0; i < n; ++i) {
      const auto *row = base + i * stride_row;
      const double factor = mean ? scale : scale_to_one(largest_magnitude(row, stride_feature, D));
      vd8 rounded = {}, exact = {}, residual = {};
      for (int64_t d = 0; d < D; d += 8) {
        const int m = D - d < 8 ? (int)(D - d) : 8;
        vd8 wide = {};
        if (m == 8 && stride_feature == 1) {
          wide = mean ? (eight(row + d) - eight(mean + d)) * factor : eight(row + d) * factor;
        } else {
          for (int j = 0; j < m; ++j)
            wide[j] = ((double)widen(row[(d + j) * stride_feature]) - (mean ? mean[d + j] : 0.0)) * factor;
        }
        const vf8 values = Layout::round(__builtin_convertvector(wide, vf8));
        const vd8 back = __builtin_convertvector(values, vd8), rest = wide - back;
        rounded += back * back;
        exact += wide * wide;
        residual += rest * rest;
        Layout::put((typename Layout::Value *)packed, i, d, m, values);
      }
      norms[i] = {sum_of(rounded), sum_of(exact), sum_of(residual)};
    }
  });
}

}  // namespace vqfast::VQFAST_ISA
