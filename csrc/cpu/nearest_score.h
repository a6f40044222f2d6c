// Scores of codes against rows in float32: score = x . c + bias. Codes are packed in panels of 2 kLanes, rows in tiles
// of kTileRows, both feature by feature, so that the inner loop reads memory in order.
#pragma once

#include "simd.h"

namespace vqfast::VQFAST_ISA {

constexpr int kTileRows = kLanes == 16 ? 12 : 6;
constexpr int kPanelCodes = 2 * kLanes;

// The scores of one tile against one panel, in registers: kTileRows x 2 accumulators, each a chain of D multiply-adds
// that starts from the bias.
static inline __attribute__((always_inline)) void score_panel(const float *tile, const float *panel,
                                                              const float *bias, int64_t D, vf (&a)[kTileRows][2]) {
  const vf b0 = load(bias), b1 = load(bias + kLanes);
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) a[r][0] = b0, a[r][1] = b1;
  for (int64_t d = 0; d < D; ++d, panel += kPanelCodes, tile += kTileRows) {
    const vf c0 = load(panel), c1 = load(panel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r) {
      const vf value = splat(tile[r]);
      a[r][0] += value * c0;
      a[r][1] += value * c1;
    }
  }
}

// best, second and index hold kLanes values a row: the largest and the second largest score that each lane has met and
// the code of the largest. They are read and written, so that a codebook can be gone through in parts.
static void score(const float *tile, const float *panels, const float *bias, int64_t D, int64_t n_panels,
                  int64_t first_code, float *best, float *second, int32_t *index) {
  vi code;
  for (int i = 0; i < kLanes; ++i) code[i] = (int32_t)first_code + i;
  for (int64_t p = 0; p < n_panels; ++p, panels += D * kPanelCodes, bias += kPanelCodes) {
    vf a[kTileRows][2];
    score_panel(tile, panels, bias, D, a);
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r) {
      vf top = load(best + r * kLanes), next = load(second + r * kLanes);
      vi at = load(index + r * kLanes);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const vf v = a[r][h];
        next = max(next, min(top, v));
        at = v > top ? code + h * kLanes : at;
        top = max(top, v);
      }
      store(best + r * kLanes, top);
      store(second + r * kLanes, next);
      store(index + r * kLanes, at);
    }
    code += kPanelCodes;
  }
}

// All scores of a tile: scores[r * stride + code].
static void score_all(const float *tile, const float *panels, const float *bias, int64_t D, int64_t n_panels,
                      int64_t stride, float *scores) {
  for (int64_t p = 0; p < n_panels; ++p, panels += D * kPanelCodes, bias += kPanelCodes, scores += kPanelCodes) {
    vf a[kTileRows][2];
    score_panel(tile, panels, bias, D, a);
    for (int r = 0; r < kTileRows; ++r) {
      store(scores + r * stride, a[r][0]);
      store(scores + r * stride + kLanes, a[r][1]);
    }
  }
}

}  // namespace vqfast::VQFAST_ISA
