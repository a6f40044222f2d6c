// What centring needs to know of a codebook.
#pragma once

#include "convert.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {

// For features d0..d0+m-1 of a codebook (K, D), over their finite values: the sum of value * share, how many they are, the
// least and the largest.
static void feature_ranges(vqfast_dtype dtype, const void *codebook, int64_t K, int64_t D, int64_t d0, int m,
                           double share, double *sum, double *count, double *least, double *largest) {
  constexpr double kFinite = __DBL_MAX__;
  constexpr int kLimit = 8;
  with_element(dtype, [&](auto *type) {
    const auto *base = (decltype(type))codebook + d0;
    double sums[kLimit] = {}, counts[kLimit] = {}, low[kLimit], high[kLimit];
    for (int j = 0; j < kLimit; ++j) low[j] = kFinite, high[j] = -kFinite;
    const auto take = [&](const auto *row, int limit) __attribute__((always_inline)) {
      for (int j = 0; j < limit; ++j) {
        const double v = (double)widen(row[j]);
        const bool finite = v <= kFinite && v >= -kFinite;
        sums[j] += finite ? v * share : 0.0;  // divided before the sum, which might overflow
        counts[j] += finite ? 1.0 : 0.0;
        low[j] = finite && v < low[j] ? v : low[j];
        high[j] = finite && v > high[j] ? v : high[j];
      }
    };
    if (m == kLimit)
      for (int64_t k = 0; k < K; ++k) take(base + k * D, kLimit);
    else
      for (int64_t k = 0; k < K; ++k) take(base + k * D, m);
    for (int j = 0; j < m; ++j) sum[j] = sums[j], count[j] = counts[j], least[j] = low[j], largest[j] = high[j];
  });
}

}  // namespace vqfast::VQFAST_ISA
