// The running maxima of the score loops.
#pragma once

#include "simd.h"

namespace vqfast::VQFAST_ISA {

// Takes `vectors` vectors of scores of one row into its best, second and index; code is the code of the first lane.
template <int vectors>
static inline __attribute__((always_inline)) void take_scores(const vf *scores, vi code, float *best, float *second,
                                                              int32_t *index) {
  vf top = load(best), next = load(second);
  vi at = load(index);
#pragma GCC unroll 4
  for (int h = 0; h < vectors; ++h) {
    next = max(next, min(top, scores[h]));
    at = scores[h] > top ? code + h * kLanes : at;
    top = max(top, scores[h]);
  }
  store(best, top);
  store(second, next);
  store(index, at);
}

static inline vi first_codes(int64_t first) {
  vi code;
  for (int i = 0; i < kLanes; ++i) code[i] = (int32_t)first + i;
  return code;
}

}  // namespace vqfast::VQFAST_ISA
