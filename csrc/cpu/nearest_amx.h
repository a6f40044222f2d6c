// Scores from bfloat16 products with float32 sums, by AMX tiles: 32 rows against 32 codes in four accumulators, 32
// features a step. A tile register is 16 rows of 64 bytes.
//
//   rows:   [feature block][half][row 16][feature 32]
//   codes:  [feature block][half][feature pair 16][code 16][feature of the pair 2]
#pragma once

#include <immintrin.h>
#include <string.h>

#include "bfloat16.h"
#include "nearest_lanes.h"
#include "nearest_pack.h"

namespace vqfast::VQFAST_ISA::amx_tiles {

constexpr int kSide = 32;      // rows of a tile, codes of a panel
constexpr int kFeatures = 32;  // of one step
constexpr int kBlock = kSide * kFeatures;

namespace {
struct Bfloat16 {
  typedef uint16_t Value;
  static inline __attribute__((always_inline)) vfw round(vfw v) { return round_to_bfloat16(v); }
};

// Places past the last feature are written too: their values are zero.
struct RowLayout : Bfloat16 {
  static inline __attribute__((always_inline)) void put(uint16_t *packed, int64_t i, int64_t d0, int, vfw values) {
    *(vh8_unaligned *)(packed + d0 / kFeatures * kBlock + i * kFeatures + d0 % kFeatures) = bfloat16_bits(values);
  }
};

struct CodeLayout : Bfloat16 {
  static inline __attribute__((always_inline)) void put(uint16_t *packed, int64_t i, int64_t d0, int, vfw values) {
    typedef uint32_t pairs __attribute__((vector_size(16)));
    const pairs bits = (pairs)bfloat16_bits(values);
    uint32_t *to = (uint32_t *)(packed + d0 / kFeatures * kBlock + i / 16 * (kBlock / 2));
    for (int j = 0; j < 4; ++j) to[(d0 % kFeatures / 2 + j) * 16 + i % 16] = bits[j];
  }
};
}  // namespace

static int64_t blocks(int64_t D) { return (D + kFeatures - 1) / kFeatures; }

template <class Layout>
static void pack(vqfast_dtype dtype, const void *const *vectors, int64_t n, int64_t D, const double *mean, double scale,
                 void *packed, PackedNorm *norms) {
  pack_vectors<Layout>(dtype, vectors, n, D, mean, scale, packed, blocks(D) * kBlock * 2, norms);
}

namespace {
// Eight tile registers of 16 x 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
}  // namespace

// torch's own matrix products configure the tiles of the same threads, and expect to find what they left.
static void begin(void *saved) {
  _tile_storeconfig(saved);
  // Static: the intrinsic does not tell the compiler that it reads all 64 bytes.
  static constexpr TileConfig config;
  _tile_loadconfig(&config);
}
static void end(const void *saved) {
  if (*(const uint8_t *)saved == 0)
    _tile_release();
  else
    _tile_loadconfig(saved);
}

// Tile registers 0..3: rows 0-15 and 16-31 (second bit) against codes 0-15 and 16-31 (first bit).
static inline __attribute__((always_inline)) void multiply(const uint16_t *tile, const uint16_t *panel,
                                                           const float *bias, int64_t n_blocks) {
  _tile_loadd(0, bias, 0);  // a stride of 0 bytes: every row starts from the bias
  _tile_loadd(1, bias + 16, 0);
  _tile_loadd(2, bias, 0);
  _tile_loadd(3, bias + 16, 0);
  for (int64_t k = 0; k < n_blocks; ++k, tile += kBlock, panel += kBlock) {
    _tile_loadd(4, tile, 64);
    _tile_loadd(6, panel, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + kBlock / 2, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, tile + kBlock / 2, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

static void score(const void *tile, const void *panels, const float *bias, int64_t D, int64_t n_panels, int64_t group,
                  int64_t stride, float *maxima) {
  alignas(64) float sums[2][kSide * kSide];
  const int64_t n_blocks = blocks(D);
  const uint16_t *panel = (const uint16_t *)panels;
  int64_t taken = 0;  // panels of the current group
  // One panel behind: the vector unit takes the scores of a panel while the matrix unit is at the next.
  for (int64_t p = 0; p <= n_panels; ++p, bias += kSide, panel += n_blocks * kBlock) {
    if (p < n_panels) multiply((const uint16_t *)tile, panel, bias, n_blocks);
    if (p > 0) {
      const float *from = sums[(p - 1) % 2];
      // Two loops, each without a branch.
      if (taken == 0)
        for (int r = 0; r < kSide; ++r)
          take_scores(load(from + r * kSide), load(from + r * kSide + 16), true, maxima + r * stride);
      else
        for (int r = 0; r < kSide; ++r)
          take_scores(load(from + r * kSide), load(from + r * kSide + 16), false, maxima + r * stride);
      if (++taken == group) taken = 0, maxima += kLanes;
    }
    if (p < n_panels) {
      float *to = sums[p % 2];
      _tile_stored(0, to, kSide * 4);
      _tile_stored(1, to + 16, kSide * 4);
      _tile_stored(2, to + 16 * kSide, kSide * 4);
      _tile_stored(3, to + 16 * kSide + 16, kSide * 4);
    }
  }
}

extern const ScoreEngine engine;
const ScoreEngine engine = {
    "tiles", kLanes, kSide, kSide, 2, kFeatures, 32, pack<RowLayout>, pack<CodeLayout>, score, begin, end,
};

}  // namespace vqfast::VQFAST_ISA::amx_tiles
