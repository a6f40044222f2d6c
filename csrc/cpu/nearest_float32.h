// Scores in float32, a chain of D multiply-adds from the bias. Tiles of kTileRows rows and panels of two vectors of
// codes, both feature by feature, so that the inner loop reads memory in order and keeps its sums in registers.
#pragma once

#include "nearest_lanes.h"
#include "nearest_pack.h"

namespace vqfast::VQFAST_ISA::float32 {

constexpr int kTileRows = kLanes == 16 ? 12 : 6;
constexpr int kPanelCodes = 2 * kLanes;

namespace {
template <int width>
struct Layout {
  typedef float Value;
  static inline __attribute__((always_inline)) vfw round(vfw v) { return v; }
  static inline __attribute__((always_inline)) void put(float *packed, int64_t i, int64_t d0, int m, vfw values) {
    for (int j = 0; j < m; ++j) packed[(d0 + j) * width + i] = values[j];
  }
};
}  // namespace

template <int width>
static void pack(vqfast_dtype dtype, const void *const *vectors, int64_t n, int64_t D, const double *mean, double scale,
                 void *packed, PackedNorm *norms) {
  pack_vectors<Layout<width>>(dtype, vectors, n, D, mean, scale, packed, D * width * 4, norms);
}

static inline __attribute__((always_inline)) void score_panel(const float *tile, const float *panel, const float *bias,
                                                              int64_t D, vf (&a)[kTileRows][2]) {
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

static void score(const void *tile, const void *panels, const float *bias, int64_t D, int64_t n_panels, int64_t group,
                  int64_t stride, float *maxima) {
  score_panels<kTileRows>(
      (const float *)panels, D * kPanelCodes, bias, n_panels, group, stride, maxima,
      [&](const float *panel, const float *start, vf(&scores)[kTileRows][2])
          __attribute__((always_inline)) { score_panel((const float *)tile, panel, start, D, scores); });
}

static const ScoreEngine engine = {
    "float32", kLanes, kTileRows, kPanelCodes, 4, 1, 1, pack<kTileRows>, pack<kPanelCodes>, score, nullptr, nullptr,
};

}  // namespace vqfast::VQFAST_ISA::float32
