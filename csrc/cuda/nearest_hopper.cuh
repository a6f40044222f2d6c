// Scores by Hopper's products of warpgroups: kernels/nearest/README.md has the drawing.
#pragma once

#include "hopper.cuh"
#include "nearest_candidates.cuh"

namespace vqfast {

// Where one that goes round the ring stands.
struct Turn {
  int stage, parity;
  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Of a block's persistent work: a tile of rows against a part of the codebook.
struct HopperItem {
  int row_tile, split, first_code, codes;
};
__device__ __forceinline__ HopperItem hopper_item(const HopperPlan &plan, int row_tiles, int item) {
  const int split = item / row_tiles, first = split * (int)plan.parts.tiles_per_split;
  const int tiles = min((int)plan.parts.tiles_per_split, (int)plan.code_tiles - first);
  return {item % row_tiles, split, first * plan.tile_codes, tiles * plan.tile_codes};
}

// What a thread knows of its two rows, `row` and `row + 8` of the block: of them it has the columns 8 j + 2 (lane % 4)
// and the next of each tile of kProductCodes. Four neighbouring lanes share their rows, and all that they know.
struct HopperRows {
  int row;
  float best[2], least[2];
};

// The scores of a tile against two rows; only where the largest of eight reaches far enough, each is looked at. By
// whole warps. bias: of this thread's first column; code: of that.
template <bool kAddBias, int kRoom>
__device__ __forceinline__ void examine(const float (&sums)[64], const float *bias, int code, const float *reach,
                                        ListedCandidates<kRoom> *lists, HopperRows &rows) {
  const int lane = threadIdx.x % 32;
  // Column 8 j + e of this thread.
  const auto score = [&](int r, int j, int e) {
    const float product = sums[4 * j + 2 * r + e];
    return kAddBias ? product + bias[8 * j + e] : product;  // rounds: [sum]
  };
  float parts[2][4], top[2];
#pragma unroll
  for (int p = 0; p < 4; ++p)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto larger = [&](int j) { return fmaxf(score(r, j, 0), score(r, j, 1)); };
      parts[r][p] = fmaxf(fmaxf(larger(4 * p), larger(4 * p + 1)), fmaxf(larger(4 * p + 2), larger(4 * p + 3)));
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) top[r] = fmaxf(fmaxf(parts[r][0], parts[r][1]), fmaxf(parts[r][2], parts[r][3]));
  // False, too, where the bound, and so `least`, is NaN.
  if (!__any_sync(kFullWarp, top[0] >= rows.least[0] || top[1] >= rows.least[1])) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = fmaxf(top[r], __shfl_xor_sync(kFullWarp, top[r], 1));
    top[r] = fmaxf(top[r], __shfl_xor_sync(kFullWarp, top[r], 2));
    if (top[r] > rows.best[r]) {
      rows.best[r] = top[r];
      rows.least[r] = least_within(top[r], reach[rows.row + 8 * r]);
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      if (!(parts[r][p] >= rows.least[r]) || parts[r][p] == kNever) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int j = 4 * p + i / 2, e = i % 2;
        if (score(r, j, e) >= rows.least[r]) lists[rows.row + 8 * r].add(code + 8 * j + e, score(r, j, e));
      }
    }
  }
  __syncwarp();
  if (lane % 4 < 2) {  // one lane a row
    ListedCandidates<kRoom> &list = lists[rows.row + 8 * (lane % 4)];
    if (list.count > kRoom / 2) list.drop_below(lane % 4 ? rows.least[1] : rows.least[0]);
  }
  __syncwarp();
}

// One block a multiprocessor, which takes one item after the other. The last warpgroup's first thread has rows and
// codes copied to shared memory: kRows rows, which stay for an item, and codes through a ring of stages of kStageBytes.
// Each of the others multiplies 64 rows by kProductCodes codes at a time, in turn into two sets of sums: while one is
// added to, the maxima of the other are taken. Rows beyond n are whatever the memory holds, and are not written.
template <int kGroups, int kPanel>
__global__ void __launch_bounds__((kGroups + 1) * kWarpgroup, 1)
    nearest_hopper_scores(HopperPlan plan, PackedVectors x, int64_t n, PackedVectors codes, const float *bias,
                          const float *reaches, KeptCandidates out) {
  constexpr int kRows = 64 * kGroups, kRowBytes = 1 << kPanel, kTilesPerStage = 128 / kRowBytes;
  constexpr bool kAddBias = kPanel == 7;
  VQFAST_DYNAMIC_SHARED(dynamic);
  VQFAST_SHARED(ListedCandidates<kHopperListed>, lists, [kRows]);
  VQFAST_SHARED(float, reach, [kRows]);
  VQFAST_SHARED(Barrier, filled, [kHopperStages]);
  VQFAST_SHARED(Barrier, emptied, [kHopperStages]);
  VQFAST_SHARED(Barrier, rows_filled, [1]);
  VQFAST_SHARED(Barrier, rows_emptied, [1]);
  const int thread = threadIdx.x, lane = thread % 32, group = thread / kWarpgroup;
  unsigned char *const tile_rows = dynamic + (0 - shared_address(dynamic)) % 1024;  // an atom starts at its multiple
  unsigned char *const ring = tile_rows + plan.panels * (kRows * kRowBytes);
  const int row_tiles = (int)((n + kRows - 1) / kRows), items = row_tiles * (int)plan.parts.splits;
  if (thread == 0) {
    for (int s = 0; s < plan.stages; ++s) {
      initialise(filled[s], 1);
      initialise(emptied[s], kGroups * kWarpgroup / 32);
    }
    initialise(*rows_filled, 1);
    initialise(*rows_emptied, kGroups * kWarpgroup / 32);
    publish_barriers();
  }
  __syncthreads();

  Turn turn = {0, 0};
  int item_parity = 0;
  if (group == kGroups) {
    give_registers_up<kGroups == 3 ? 32 : 24>();
    if (thread % kWarpgroup != 0) return;
    const auto piece = [](const PackedVectors &from, int panel, int64_t first) {
      return reinterpret_cast<const unsigned char *>(from.values) + (panel * from.count + first) * kRowBytes;
    };
    for (int i = blockIdx.x; i < items; i += gridDim.x, item_parity ^= 1) {
      const HopperItem item = hopper_item(plan, row_tiles, i);
      wait(*rows_emptied, item_parity ^ 1);
      arrive_and_expect(*rows_filled, plan.panels * (kRows * kRowBytes));
      for (int panel = 0; panel < plan.panels; ++panel)
        copy_in_bulk(tile_rows + panel * (kRows * kRowBytes), piece(x, panel, (int64_t)item.row_tile * kRows),
                     kRows * kRowBytes, *rows_filled);
      for (int code = 0; code < item.codes; code += kStageBytes / kRowBytes)
        for (int panel = 0; panel < plan.panels; ++panel, turn.next(plan.stages)) {
          wait(emptied[turn.stage], turn.parity ^ 1);
          arrive_and_expect(filled[turn.stage], kStageBytes);
          copy_in_bulk(ring + turn.stage * kStageBytes, piece(codes, panel, item.first_code + code), kStageBytes,
                       filled[turn.stage]);
        }
    }
  } else {
    take_registers<kGroups == 3 ? 160 : 240>();
    HopperRows rows;
    rows.row = thread / 32 * 16 + lane / 4;
    const uint64_t rows_at = describe<kRowBytes>(shared_address(tile_rows) + group * 64 * kRowBytes);
    const uint64_t ring_at = describe<kRowBytes>(shared_address(ring));
    float even[64], odd[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) even[i] = odd[i] = 0;
    for (int i = blockIdx.x; i < items; i += gridDim.x, item_parity ^= 1) {
      const HopperItem item = hopper_item(plan, row_tiles, i);
      const int tiles = item.codes / kProductCodes;
      const auto look = [&](const float (&sums)[64], int tile) {
        const int code = item.first_code + tile * kProductCodes + lane % 4 * 2;
        examine<kAddBias>(sums, bias + code, code, reach, lists, rows);
      };
      const int64_t first_row = (int64_t)item.row_tile * kRows;
      if (lane < 16) {
        const int row = thread / 32 * 16 + lane;
        reach[row] = first_row + row < n ? reaches[first_row + row] : NAN;
        lists[row].count = 0;
      }
      __syncwarp();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rows.best[r] = kNever;
        rows.least[r] = least_within(kNever, reach[rows.row + 8 * r]);
      }

      // Issues a tile's products of a panel, and waits for all that were issued before: the stage of those is given
      // back.
      int held = -1;
      const auto give_back = [&] {
        if (held >= 0 && lane == 0) arrive(emptied[held]);
        held = -1;
      };
      const auto multiply = [&](float (&sums)[64], int tile, int panel, bool onto) {
        const int part = tile % kTilesPerStage;
        if (part == 0) wait(filled[turn.stage], turn.parity);
        const uint64_t a = rows_at + panel * (kRows * kRowBytes / 16);
        const uint64_t b = ring_at + turn.stage * (kStageBytes / 16) + part * (kProductCodes * kRowBytes / 16);
        begin_products(sums);
#pragma unroll
        for (int k = 0; k < kRowBytes / 32; ++k) multiply_add(sums, a + 2 * k, b + 2 * k, onto || k > 0);
        end_product_group();
        wait_for_products<1>();
        give_back();
        if (part == kTilesPerStage - 1) {
          held = turn.stage;
          turn.next(plan.stages);
        }
      };
      const auto multiply_rest = [&](float (&sums)[64], int tile) {
        if constexpr (kTilesPerStage == 1)
          for (int panel = 1; panel < plan.panels; ++panel) multiply(sums, tile, panel, true);
      };
      wait(*rows_filled, item_parity);
      // Nothing is under way from one turn to the next: the compiler could not tell that it may be.
      for (int tile = 0; tile < tiles; tile += 2) {
        multiply(even, tile, 0, false);
        multiply_rest(even, tile);
        multiply(odd, tile + 1, 0, false);
        hold(even);
        look(even, tile);
        multiply_rest(odd, tile + 1);
        wait_for_products<0>(odd);
        give_back();
        if (tile + 2 == tiles && lane == 0) arrive(*rows_emptied);
        look(odd, tile + 1);
      }

      __syncwarp();
      const int row = rows.row + 8 * (lane % 4);
      if (lane % 4 < 2 && first_row + row < n)
        lists[row].keep(lane % 4 ? rows.best[1] : rows.best[0], lane % 4 ? rows.least[1] : rows.least[0], out,
                        item.split * n + first_row + row);
      __syncwarp();
    }
  }
}

}  // namespace vqfast
