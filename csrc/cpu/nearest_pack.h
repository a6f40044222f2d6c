// Centring, scaling and rounding of vectors for the score loops. A Layout says where a value goes:
//   Layout::Value               the packed type
//   Layout::narrow(float)       rounds to it
//   Layout::widen(Value)        back to float
//   Layout::put(packed, i, d0, m, values)   stores features d0..d0+m-1 of vector i; d0 is a multiple of kPackBlock
#pragma once

#include <string.h>

#include "convert.h"
#include "score_engine.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {

constexpr int kPackBlock = 64;

// The difference and its scaling are float64; they round once, to the format (bfloat16 by way of float32).
template <class Layout>
static void pack_vectors(vqfast_dtype dtype, const void *rows, int64_t stride_row, int64_t stride_feature, int64_t n,
                         int64_t D, const double *mean, double scale, void *packed, int64_t bytes,
                         PackedNorm *norms) {
  memset(packed, 0, bytes);
  with_element(dtype, [&](auto *type) {
    const auto *base = (decltype(type))rows;
    for (int64_t i = 0; i < n; ++i) {
      // Eight partial sums each: the compiler keeps the order of a sum, so one alone would not vectorise.
      double rounded[8] = {}, exact[8] = {}, residual[8] = {};
      for (int64_t d0 = 0; d0 < D; d0 += kPackBlock) {
        const int m = D - d0 < kPackBlock ? (int)(D - d0) : kPackBlock;
        double wide[kPackBlock];
        typename Layout::Value values[kPackBlock];
        const auto *v = base + i * stride_row + d0 * stride_feature;
        if (stride_feature == 1) {
          for (int j = 0; j < m; ++j) wide[j] = (double)widen(v[j]);
        } else {
          for (int j = 0; j < m; ++j) wide[j] = (double)widen(v[j * stride_feature]);
        }
        for (int j = 0; j < m; ++j) wide[j] = scale * (wide[j] - mean[d0 + j]);
        const int padded = (m + 7) / 8 * 8;
        for (int j = m; j < padded; ++j) wide[j] = 0;
        for (int j = 0; j < padded; ++j) values[j] = Layout::narrow((float)wide[j]);
        for (int j = 0; j < padded; j += 8) {
          for (int l = 0; l < 8; ++l) {
            const double value = Layout::widen(values[j + l]), rest = wide[j + l] - value;
            rounded[l] += value * value;
            exact[l] += wide[j + l] * wide[j + l];
            residual[l] += rest * rest;
          }
        }
        Layout::put((typename Layout::Value *)packed, i, d0, m, values);
      }
      norms[i] = {0, 0, 0};
      for (int l = 0; l < 8; ++l) {
        norms[i].rounded += rounded[l];
        norms[i].exact += exact[l];
        norms[i].residual += residual[l];
      }
    }
  });
}

}  // namespace vqfast::VQFAST_ISA
