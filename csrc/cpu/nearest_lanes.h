// What the score loops keep of their scores.
#pragma once

#include "simd.h"

namespace vqfast::VQFAST_ISA {

// The largest of a panel's two vectors of scores of one row, and of what its group's panels before it have left.
static inline __attribute__((always_inline)) void take_scores(vf first, vf second, bool begins, float *maxima) {
  const vf top = max(first, second);
  store(maxima, begins ? top : max(top, load(maxima)));
}

// The loop over panels of the engines that keep a tile's scores in registers: score_panel(panel, bias, scores) computes
// them; panel_values is what a panel holds.
template <int rows, class Value, class ScorePanel>
static inline __attribute__((always_inline)) void score_panels(const Value *panel, int64_t panel_values,
                                                               const float *bias, int64_t n_panels, int64_t group,
                                                               int64_t stride, float *maxima, ScorePanel score_panel) {
  for (int64_t first = 0; first < n_panels; first += group, maxima += kLanes)
    for (int64_t p = first; p < first + group && p < n_panels; ++p, panel += panel_values, bias += 2 * kLanes) {
      vf scores[rows][2];
      score_panel(panel, bias, scores);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) take_scores(scores[r][0], scores[r][1], p == first, maxima + r * stride);
    }
}

}  // namespace vqfast::VQFAST_ISA
