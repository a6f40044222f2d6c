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

// The loops over panels of the engines that keep a tile's scores in registers, two vectors of codes a row.
// score_panel(panel, bias, scores) computes them; panel_values is what a panel holds.
template <int rows, class Value, class ScorePanel>
static inline __attribute__((always_inline)) void score_panels(const Value *panel, int64_t panel_values,
                                                               const float *bias, int64_t n_panels, int64_t first_code,
                                                               float *best, float *second, int32_t *index,
                                                               ScorePanel score_panel) {
  vi code = first_codes(first_code);
  for (int64_t p = 0; p < n_panels; ++p, panel += panel_values, bias += 2 * kLanes, code += 2 * kLanes) {
    vf scores[rows][2];
    score_panel(panel, bias, scores);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
      take_scores<2>(scores[r], code, best + r * kLanes, second + r * kLanes, index + r * kLanes);
  }
}

template <int rows, class Value, class ScorePanel>
static inline __attribute__((always_inline)) void store_panels(const Value *panel, int64_t panel_values,
                                                               const float *bias, int64_t n_panels, int64_t stride,
                                                               float *out, ScorePanel score_panel) {
  for (int64_t p = 0; p < n_panels; ++p, panel += panel_values, bias += 2 * kLanes, out += 2 * kLanes) {
    vf scores[rows][2];
    score_panel(panel, bias, scores);
    for (int r = 0; r < rows; ++r) {
      store(out + r * stride, scores[r][0]);
      store(out + r * stride + kLanes, scores[r][1]);
    }
  }
}

}  // namespace vqfast::VQFAST_ISA
