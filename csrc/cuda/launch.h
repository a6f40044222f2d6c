// Launch plans: how each op is cut into blocks, as pure functions of its sizes and of the device's limits.
#pragma once

#include <stdint.h>

namespace vqfast {

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // that a block may ask for
  int grid_x;
  int capability;  // 90 is 9.0
};

struct LaunchPlan {
  unsigned grid_x, grid_y, threads;
  int64_t shared_bytes;
};

// Dynamic shared memory that a block has without asking: of 48 KB, what the kernel's own variables leave for certain.
constexpr int64_t kPlainSharedBytes = 32 << 10;

constexpr int64_t kMaxCodes = 0x7fffffff - 1023;  // code numbers, padded to tiles and strides, fit 32 bits

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

// A block per `per_block` items. Kernels stride by the grid, for there may be more items than blocks.
constexpr LaunchPlan items_plan(int64_t items, int64_t per_block, unsigned threads, DeviceLimits limits) {
  return {(unsigned)at_least(1, at_most(ceil_div(items, per_block), limits.grid_x)), 1, threads, 0};
}

// The same for codes, features and chunks, of which there are never more than blocks; kernels do not stride.
constexpr LaunchPlan each_plan(int64_t items, int64_t per_block, unsigned threads) {
  return {(unsigned)ceil_div(items, per_block), 1, threads, 0};
}

// ---- nearest -------------------------------------------------------------------------------------------------------

constexpr int kSearchThreads = 256;
constexpr int kTileRows = 128, kTileCodes = 128, kTileFeatures = 8;
constexpr int kSearchBlocksPerMultiprocessor = 2;
constexpr int kTensorRows = 128, kTensorCodes = 256;
constexpr int kListed = 24, kKept = 8;  // of a row, while its scores come in and after
constexpr int kCodePadding = 512;       // whole tiles of every kind of scores
constexpr int64_t kPackedBytes = (int64_t)128 << 20;

// The codebook cut into `splits` parts, so that few rows fill the device too.
struct CodeSplits {
  int64_t splits, tiles_per_split;
};

// The cut with the least time, counted in code tiles that a slot for a block goes through one after the other; half a
// tile more per block for its start. At most 8 waves of blocks, so that partial results stay small.
constexpr CodeSplits split_codes(int64_t row_tiles, int64_t code_tiles, int64_t slots) {
  int64_t least = -1, best = code_tiles;
  for (int64_t s = 1; s <= at_most(code_tiles, 1024); ++s) {
    if (s > 1 && s * row_tiles > 8 * slots) break;
    const int64_t tiles = ceil_div(code_tiles, s);
    const int64_t cost = ceil_div(row_tiles * s, slots) * (2 * tiles + 1);
    if (least < 0 || cost < least) {
      least = cost;
      best = tiles;
    }
  }
  return {ceil_div(code_tiles, best), best};
}

struct SearchPlan {
  int64_t row_tiles, code_tiles;
  CodeSplits parts;
  int64_t padded_codes, padded_features;
  int64_t exact_blocks;  // of the fixed grid that decides the rows left open
};

constexpr SearchPlan search_plan(int64_t N, int64_t D, int64_t K, DeviceLimits limits) {
  SearchPlan plan = {};
  plan.row_tiles = ceil_div(N, kTileRows);
  plan.code_tiles = ceil_div(K, kTileCodes);
  plan.parts =
      split_codes(plan.row_tiles, plan.code_tiles, (int64_t)kSearchBlocksPerMultiprocessor * limits.multiprocessors);
  plan.padded_codes = ceil_div(K, kCodePadding) * kCodePadding;
  plan.padded_features = ceil_div(D, kTileFeatures) * kTileFeatures;
  plan.exact_blocks = at_most(4 * (int64_t)limits.multiprocessors, limits.grid_x);
  return plan;
}

constexpr LaunchPlan search_scores_plan(const SearchPlan &plan, DeviceLimits limits) {
  return {(unsigned)at_least(1, at_most(plan.row_tiles, limits.grid_x)), (unsigned)plan.parts.splits, kSearchThreads,
          0};
}

// Scores by tensor cores: rows stay in shared memory, codes come through a ring.
struct TensorPlan {
  int stages;     // of the ring; 0: too many features
  int pitch;      // features of a packed vector
  int64_t chunk;  // rows packed at a time
  int64_t shared_bytes;
  int64_t code_tiles;
  CodeSplits parts;
};

constexpr TensorPlan tensor_plan(int64_t N, int64_t D, int64_t K, DeviceLimits limits) {
  TensorPlan plan = {};
  plan.pitch = (int)ceil_div(D, 16) * 16;
  const int64_t panels = ceil_div(plan.pitch, 64), stage = kTensorCodes * 128;
  // Two kilobytes stay for the kernel's other variables.
  const int64_t room = limits.shared_bytes - kTensorRows * kListed * 8 - 2048 - panels * kTensorRows * 128;
  plan.stages = room >= 3 * stage ? 3 : room >= 2 * stage ? 2 : 0;
  plan.chunk =
      at_most(N, at_least(1, at_most(kPackedBytes / (plan.pitch * 2 * kTensorRows), limits.grid_x)) * kTensorRows);
  plan.code_tiles = ceil_div(K, kTensorCodes);
  plan.parts = split_codes(ceil_div(plan.chunk, kTensorRows), plan.code_tiles, limits.multiprocessors);
  plan.shared_bytes = panels * kTensorRows * 128 + plan.stages * stage;
  return plan;
}

constexpr LaunchPlan tensor_scores_plan(const TensorPlan &plan, int64_t n) {
  return {(unsigned)ceil_div(n, kTensorRows), (unsigned)plan.parts.splits, kSearchThreads, plan.shared_bytes};
}

// Scores by products of warpgroups, for compute capability 9.0: rows stay in shared memory, codes come through a ring.
constexpr int kHopperStages = 8, kStageBytes = 16 << 10, kHopperListed = 16;

struct HopperPlan {
  int groups;  // warpgroups that multiply, of 64 rows each; 0: too many features
  int panel;   // log2 of the bytes that a vector has in a panel
  int panels;
  int stages;      // of the ring
  bool with_bias;  // among the features, which then take one panel of less than 128 bytes
  int64_t chunk;   // rows packed at a time
  int64_t room;    // for whole tiles of them
  int64_t shared_bytes;
  int tile_codes;  // at least two products' and a stage's
  int64_t code_tiles;
  CodeSplits parts;
};

constexpr HopperPlan hopper_plan(int64_t N, int64_t D, int64_t K, DeviceLimits limits) {
  HopperPlan plan = {};
  plan.with_bias = D + 3 <= 32;
  const int64_t bytes = 2 * (plan.with_bias ? D + 3 : D);
  plan.panel = !plan.with_bias ? 7 : bytes <= 32 ? 5 : 6;
  plan.panels = (int)ceil_div(bytes, (int64_t)1 << plan.panel);
  if (limits.capability != 90) return plan;
  for (int groups = 3; groups >= 2 && plan.groups == 0; --groups) {
    const int64_t rows = 64 * groups, kept = plan.panels * rows << plan.panel;
    // The kernel's other variables; and a kilobyte until an operand can start.
    const int64_t own = rows * (kHopperListed * 8 + 8) + 1024 + 1024;
    const int64_t stages = at_most((limits.shared_bytes - own - kept) / kStageBytes, kHopperStages);
    // A warpgroup that waits for a stage may hold the one before. Narrow panels leave room for three.
    if (stages < groups || (groups == 2 && plan.panel < 7)) continue;
    plan.groups = groups;
    plan.stages = (int)stages;
    plan.shared_bytes = 1024 + kept + stages * kStageBytes;
    plan.chunk = at_most(N, at_least(1, kPackedBytes / (plan.panels * rows << plan.panel)) * rows);
    plan.room = ceil_div(plan.chunk, rows) * rows;
    plan.tile_codes = (int)at_least(256, kStageBytes >> plan.panel);
    plan.code_tiles = ceil_div(K, plan.tile_codes);
    plan.parts = split_codes(ceil_div(plan.chunk, rows), plan.code_tiles, limits.multiprocessors);
  }
  return plan;
}

constexpr LaunchPlan hopper_scores_plan(const HopperPlan &plan, int64_t n, DeviceLimits limits) {
  const int64_t items = ceil_div(n, 64 * plan.groups) * plan.parts.splits;
  return {(unsigned)at_most(items, limits.multiprocessors), 1, (unsigned)(128 * (plan.groups + 1)), plan.shared_bytes};
}

// ---- softmax over a row of K scores --------------------------------------------------------------------------------

constexpr unsigned kMaxRowThreads = 512;

// One block a row, about two vectors a thread. shared_bytes keeps the row between passes; 0 where it does not fit, and
// the row is read again.
constexpr LaunchPlan softmax_plan(int64_t rows, int64_t K, int vector, int64_t accumulator_bytes, DeviceLimits limits) {
  const int64_t vectors = ceil_div(K, vector);
  const int64_t threads = at_least(32, at_most(ceil_div(vectors, 64) * 32, kMaxRowThreads));
  const int64_t kept = ceil_div(vectors, threads) * threads * vector * accumulator_bytes;
  // A kilobyte stays for the kernel's own variables.
  return {(unsigned)at_least(1, at_most(rows, limits.grid_x)), 1, (unsigned)threads,
          kept <= limits.shared_bytes - 1024 ? kept : 0};
}

// ---- a step through matrices ---------------------------------------------------------------------------------------

constexpr unsigned kStepThreads = 128;
constexpr int kStepBlocks = 2;   // a multiprocessor at the least: without it ptxas takes fewer registers than it needs
constexpr int kStepColumns = 2;  // of a product, that a thread sums up at once
constexpr int64_t kMostStepCodes = 1024;

// Numbers from one code of a tile to the next: even, for 16-byte reads of a code's rows, and not a multiple of the
// banks.
constexpr int step_pitch(int tile_rows) { return tile_rows + 2; }

struct StepPlan {
  int tile_rows;           // 16, 8 or 4
  int64_t tiles_a_sample;  // the matrices are a sample's, so that no tile goes over its end
  LaunchPlan launch;
};

// A block a tile, which is in shared memory twice: before the product and after.
constexpr StepPlan step_plan(int64_t B, int64_t L, int64_t K, DeviceLimits limits) {
  StepPlan plan = {};
  for (int rows = 16; rows >= 4 && plan.tile_rows == 0; rows /= 2) {
    const int64_t bytes = 2 * K * step_pitch(rows) * 8;
    // Four kilobytes stay for the kernel's own variables.
    if (bytes > limits.shared_bytes - 4096 && rows > 4) continue;
    plan.tile_rows = rows;
    plan.tiles_a_sample = ceil_div(L, rows);
    plan.launch = {(unsigned)at_least(1, at_most(B * plan.tiles_a_sample, limits.grid_x)), 1, kStepThreads, bytes};
  }
  return plan;
}

// ---- lookup --------------------------------------------------------------------------------------------------------

constexpr int kLookupThreads = 256, kLookupWarps = kLookupThreads / 32;

// A warp a row, or a block a tile of 32 rows.
constexpr LaunchPlan lookup_plan(int64_t N, bool vectors, DeviceLimits limits) {
  return items_plan(N, vectors ? kLookupWarps : 32, kLookupThreads, limits);
}

// ---- codebook statistics -------------------------------------------------------------------------------------------

constexpr int kPiece = 64;  // vectors that one block adds up
constexpr int kPlaceThreads = 64, kSumThreads = 256, kScanThreads = 1024;

struct StatsPlan {
  int64_t chunks, rows_per_chunk;  // a warp counts and places the rows of a chunk
  int64_t pieces;
};

// Up to 256 chunks, fewer where a table of (K, chunks) would pass 32 MiB.
constexpr StatsPlan stats_plan(int64_t N, int64_t K) {
  const int64_t most = at_least(8, at_most(256, (int64_t)(1 << 23) / K));
  const int64_t rows = at_least(256, ceil_div(ceil_div(N, most), 32) * 32);
  return {at_least(1, ceil_div(N, rows)), rows, ceil_div(N, kPiece)};
}

constexpr LaunchPlan stats_sum_plan(const StatsPlan &plan, int64_t columns, DeviceLimits limits) {
  const int64_t threads = at_most(ceil_div(columns, 32) * 32, kSumThreads);
  return {(unsigned)at_least(1, at_most(plan.pieces, limits.grid_x)),
          (unsigned)at_most(ceil_div(columns, threads), 65535), (unsigned)threads, 0};
}

// ---- one thread a token, one warp a row ----------------------------------------------------------------------------

constexpr LaunchPlan tokens_plan(int64_t tokens, DeviceLimits limits) { return items_plan(tokens, 256, 256, limits); }

// A fixed grid that strides over the rows: most of them need no work when their scale is 1.
constexpr LaunchPlan scale_rows_plan(int64_t rows, DeviceLimits limits) {
  const int64_t blocks = at_most(ceil_div(rows, 8), at_most(16 * (int64_t)limits.multiprocessors, limits.grid_x));
  return {(unsigned)at_least(1, blocks), 1, 256, 0};
}

}  // namespace vqfast
