// What decides the rows that the scores leave open: finding the codes in question, distances in float64.
#pragma once

#include "convert.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {

// Positions of the scores that are at least `threshold`, in order; returns how many.
static int64_t find_scores(const float *scores, int64_t n, float threshold, int32_t *found) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const vi above = load(scores + i) >= splat(threshold);
    bool any = false;
    for (int l = 0; l < kLanes; ++l) any |= above[l] != 0;
    if (!any) continue;
    for (int l = 0; l < kLanes; ++l)
      if (above[l]) found[count++] = (int32_t)(i + l);
  }
  return count;
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

}  // namespace vqfast::VQFAST_ISA
