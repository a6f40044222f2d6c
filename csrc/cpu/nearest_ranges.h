// What centring needs to know of a codebook.
#pragma once

#include "convert.h"
#include "dispatch.h"
#include "nearest_pack.h"

namespace vqfast::VQFAST_ISA {

// Takes n codes into the ranges of their D features. value * share is summed: the sum of the values might overflow.
static void feature_ranges(vqfast_dtype dtype, const void *codes, int64_t n, int64_t D, double share,
                           const FeatureRanges &ranges) {
  constexpr int64_t kBlock = 32;  // codes whose features are gone through kWide at a time, in registers
  const vd finite = (vd){} + __DBL_MAX__;
  with_element(dtype, [&](auto *type) {
    for (int64_t k0 = 0; k0 < n; k0 += kBlock) {
      const auto *block = (decltype(type))codes + k0 * D;
      const int64_t after = n - k0 < kBlock ? n - k0 : kBlock;
      for (int64_t d0 = 0; d0 < D; d0 += kWide) {
        const int m = D - d0 < kWide ? (int)(D - d0) : kWide;
        vd sum = {}, count = {}, least = finite, largest = -finite;
        for (int64_t k = 0; k < after; ++k) {
          const auto *at = block + k * D + d0;
          vd v = {};
          if (m == kWide)
            v = widened(at);
          else
            for (int j = 0; j < m; ++j) v[j] = (double)widen(at[j]);
          const auto usable = (v <= finite) & (v >= -finite);
          sum += usable ? v * share : (vd){};
          count += usable ? (vd){} + 1.0 : (vd){};
          least = usable & (v < least) ? v : least;
          largest = usable & (v > largest) ? v : largest;
        }
        for (int j = 0; j < m; ++j) {
          const int64_t d = d0 + j;
          ranges.sum[d] += sum[j];
          ranges.count[d] += count[j];
          ranges.least[d] = least[j] < ranges.least[d] ? least[j] : ranges.least[d];
          ranges.largest[d] = largest[j] > ranges.largest[d] ? largest[j] : ranges.largest[d];
        }
      }
    }
  });
}

}  // namespace vqfast::VQFAST_ISA
