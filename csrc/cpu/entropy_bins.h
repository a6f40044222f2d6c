// The soft histogram of a few grey levels: what each adds to the bins within its reach.
#pragma once

#include "simd_elements.h"
#include "simd_math.h"

namespace vqfast::VQFAST_ISA {

// density[k] += exp(-((grey[i] - lowest) / sigma - k step)^2 / 2), float32 from the square on, for the bins k < bins
// that are at most `reach` away; step and reach are counted in sigmas. Past the last bin density has room for a vector.
static void add_bins(const double *grey, int64_t n, double lowest, double sigma, double step, double reach,
                     int64_t bins, double *density) {
  const double per_step = 1 / step;
  typedef double vdd __attribute__((vector_size(8 * VQFAST_LANES)));  // as many as there are floats in a vector
  typedef double vdd_unaligned __attribute__((vector_size(8 * VQFAST_LANES), aligned(8), may_alias));
  vdd lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  for (int64_t i = 0; i < n; ++i) {
    const double u = (grey[i] - lowest) / sigma;
    // In floating point: an integer may not hold what is out of range.
    const double low = (u - reach) * per_step, high = (u + reach) * per_step;
    if (!(low <= (double)(bins - 1)) || !(high >= 0)) continue;
    const int64_t last = high < (double)bins ? (int64_t)high : bins - 1;
    for (int64_t k = low > 0 ? (int64_t)low : 0; k <= last; k += kLanes) {
      const vdd distance = (u - k * step) - lane * step;
      const vf weight = exp(__builtin_convertvector(distance * distance * -0.5, vf));
      vdd_unaligned *const sums = (vdd_unaligned *)(density + k);
      *sums += __builtin_convertvector(weight, vdd);
    }
  }
}

}  // namespace vqfast::VQFAST_ISA
