// Scores from bfloat16 products with float32 sums, by AVX512-BF16's vdpbf16ps: two features a step, otherwise as
// nearest_float32.h. The products of bfloat16 values are exact in float32.
#pragma once

#include <immintrin.h>

#include "bfloat16.h"
#include "nearest_lanes.h"
#include "nearest_pack.h"

namespace vqfast::VQFAST_ISA::bf16_pairs {

constexpr int kTileRows = 12;
constexpr int kPanelCodes = 32;

namespace {
template <int width>
struct Layout {
  typedef uint16_t Value;
  static inline __attribute__((always_inline)) vfw round(vfw v) { return round_to_bfloat16(v); }
  static inline __attribute__((always_inline)) void put(uint16_t *packed, int64_t i, int64_t d0, int m, vfw values) {
    const vh8 bits = bfloat16_bits(values);
    for (int j = 0; j < m; ++j) packed[((d0 + j) / 2 * width + i) * 2 + (d0 + j) % 2] = bits[j];
  }
};
}  // namespace

template <int width>
static void pack(vqfast_dtype dtype, const void *const *vectors, int64_t n, int64_t D, const double *mean, double scale,
                 void *packed, PackedNorm *norms) {
  pack_vectors<Layout<width>>(dtype, vectors, n, D, mean, scale, packed, (D + 1) / 2 * 4 * width, norms);
}

static inline __attribute__((always_inline)) void score_panel(const uint32_t *tile, const uint32_t *panel,
                                                              const float *bias, int64_t pairs, vf (&a)[kTileRows][2]) {
  __m512 sums[kTileRows][2];
  const __m512 b0 = _mm512_loadu_ps(bias), b1 = _mm512_loadu_ps(bias + kLanes);
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) sums[r][0] = b0, sums[r][1] = b1;
  for (int64_t d = 0; d < pairs; ++d, panel += kPanelCodes, tile += kTileRows) {
    const __m512bh c0 = (__m512bh)_mm512_loadu_si512(panel), c1 = (__m512bh)_mm512_loadu_si512(panel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r) {
      const __m512bh value = (__m512bh)_mm512_set1_epi32((int)tile[r]);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], value, c0);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], value, c1);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) a[r][0] = (vf)sums[r][0], a[r][1] = (vf)sums[r][1];
}

static void score(const void *tile, const void *panels, const float *bias, int64_t D, int64_t n_panels, int64_t group,
                  int64_t stride, float *maxima) {
  const int64_t pairs = (D + 1) / 2;
  score_panels<kTileRows>(
      (const uint32_t *)panels, pairs * kPanelCodes, bias, n_panels, group, stride, maxima,
      [&](const uint32_t *panel, const float *start, vf(&scores)[kTileRows][2])
          __attribute__((always_inline)) { score_panel((const uint32_t *)tile, panel, start, pairs, scores); });
}

extern const ScoreEngine engine;
const ScoreEngine engine = {
    "bfloat16", kLanes, kTileRows, kPanelCodes, 2, 2, 16, pack<kTileRows>, pack<kPanelCodes>, score, nullptr, nullptr,
};

}  // namespace vqfast::VQFAST_ISA::bf16_pairs
