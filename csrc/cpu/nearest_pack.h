// Centring, scaling and packing of vectors for the score kernel.
#pragma once

#include "convert.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {

// packed[d * width + i] = float32(scale (v_i[d] - mean[d])) for n vectors, zeros for i in n..width-1.
// norm[i] = ||packed_i||^2 and exact_norm[i] = ||scale (v_i - mean)||^2 before the rounding to float32, in float64;
// both are NaN or infinite if a component is. The difference is taken in float64 and rounded once.
static void pack(vqfast_dtype dtype, const void *rows, int64_t stride_row, int64_t stride_feature, int64_t n,
                 int width, int64_t D, const double *mean, double scale, float *packed, double *norm,
                 double *exact_norm) {
  constexpr int kBlock = 64;
  with_element(dtype, [&](auto *type) {
    const auto *base = (decltype(type))rows;
    for (int64_t i = 0; i < width; ++i) {
      if (i >= n) {
        for (int64_t d = 0; d < D; ++d) packed[d * width + i] = 0;
        continue;
      }
      // Eight partial sums: the compiler keeps the order of a sum, so one alone would not vectorise.
      double rounded[8] = {}, exact[8] = {};
      for (int64_t d0 = 0; d0 < D; d0 += kBlock) {
        const int m = D - d0 < kBlock ? (int)(D - d0) : kBlock;
        double wide[kBlock];
        float narrow[kBlock];
        const auto *v = base + i * stride_row + d0 * stride_feature;
        if (stride_feature == 1) {
          for (int j = 0; j < m; ++j) wide[j] = (double)widen(v[j]);
        } else {
          for (int j = 0; j < m; ++j) wide[j] = (double)widen(v[j * stride_feature]);
        }
        for (int j = 0; j < m; ++j) wide[j] = scale * (wide[j] - mean[d0 + j]);
        for (int j = m; j < kBlock; ++j) wide[j] = 0;
        for (int j = 0; j < kBlock; ++j) narrow[j] = (float)wide[j];
        for (int j = 0; j < kBlock; j += 8) {
          for (int l = 0; l < 8; ++l) {
            rounded[l] += (double)narrow[j + l] * narrow[j + l];
            exact[l] += wide[j + l] * wide[j + l];
          }
        }
        for (int j = 0; j < m; ++j) packed[(d0 + j) * width + i] = narrow[j];
      }
      norm[i] = exact_norm[i] = 0;
      for (int l = 0; l < 8; ++l) norm[i] += rounded[l], exact_norm[i] += exact[l];
    }
  });
}

}  // namespace vqfast::VQFAST_ISA
