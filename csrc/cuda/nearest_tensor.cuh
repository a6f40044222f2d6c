// Scores by mma.sync, from sm_80 on: the portable kernel.
#pragma once

#include "nearest_candidates.cuh"
#include "tensor_core.cuh"

namespace vqfast {

// A block's kTensorRows rows stay in shared memory; the codes come kTensorCodes at a time, 64 features a step, through
// a ring of kStages. A warp has the scores of 64 rows and 64 codes in registers. Rows beyond n repeat the last one and
// are not written.
template <int kStages>
__global__ void __launch_bounds__(kSearchThreads, 1)
    nearest_tensor_scores(PackedVectors x, int64_t n, PackedVectors codes, const float *bias, const float *reaches,
                          int code_tiles, int tiles_per_split, KeptCandidates out) {
  VQFAST_DYNAMIC_SHARED(tiles);
  VQFAST_SHARED(ListedCandidates<kListed>, lists, [kTensorRows]);
  VQFAST_SHARED(int, bests, [kTensorRows]);
  VQFAST_SHARED(float, reach, [kTensorRows]);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / 4 * 64, warp_code = warp % 4 * 64;
  const int chunks = x.pitch / kChunkFeatures, panels = (chunks + 7) / 8;
  unsigned char *const ring = tiles + panels * kTensorRows * kTileRowBytes;
  const int first_tile = blockIdx.y * tiles_per_split;
  const int steps = min(tiles_per_split, code_tiles - first_tile) * panels;

  const int64_t first_row = (int64_t)blockIdx.x * kTensorRows;
  if (thread < kTensorRows) {
    const int64_t row = min(first_row + thread, n - 1);
    lists[thread].count = 0;
    bests[thread] = ordered(kNever);
    reach[thread] = reaches[row];
  }
  for (int i = thread; i < kTensorRows * chunks; i += kSearchThreads) {
    const int row = i / chunks, chunk = i % chunks;
    copy_chunk(tiles + chunk / 8 * (kTensorRows * kTileRowBytes) + chunk_offset(row, chunk % 8),
               x.values + min(first_row + row, n - 1) * x.pitch + chunk * kChunkFeatures);
  }
  const auto fetch = [&](int step) {
    if (step < steps) {
      const int panel = step % panels, wanted = min(8, chunks - panel * 8);
      const bf16 *from = codes.values + (int64_t)(first_tile + step / panels) * kTensorCodes * codes.pitch + panel * 64;
      unsigned char *to = ring + step % kStages * (kTensorCodes * kTileRowBytes);
      for (int i = thread; i < kTensorCodes * wanted; i += kSearchThreads)
        copy_chunk(to + chunk_offset(i / wanted, i % wanted),
                   from + (int64_t)(i / wanted) * codes.pitch + i % wanted * kChunkFeatures);
    }
    end_copy_group();  // an empty one counts too
  };
  for (int step = 0; step < kStages - 1; ++step) fetch(step);  // the first group has the rows

  float sums[4][8][4];  // [16 rows][8 codes][of a thread]
  for (int step = 0; step < steps; ++step) {
    const int panel = step % panels, tile = first_tile + step / panels;
    wait_for_copies<kStages - 2>();
    // A list that fills up is cleared of what has lost since: between two barriers, where nobody adds to it.
    const bool crowded = panel == 0 && thread < kTensorRows && relaxed_load(lists[thread].count) > kListed / 2;
    if (__syncthreads_or(crowded)) {
      if (crowded) lists[thread].drop_below(least_within(from_ordered(bests[thread]), reach[thread]));
      __syncthreads();
    }
    fetch(step + kStages - 1);

    if (panel == 0) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float *at = bias + tile * kTensorCodes + warp_code + c * 8 + lane % 4 * 2;
        const float low = at[0], high = at[1];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          sums[r][c][0] = sums[r][c][2] = low;
          sums[r][c][1] = sums[r][c][3] = high;
        }
      }
    }
    const unsigned char *rows_from = tiles + panel * (kTensorRows * kTileRowBytes);
    const unsigned char *codes_from = ring + step % kStages * (kTensorCodes * kTileRowBytes);
    const int halves = min(8, chunks - panel * 8) / 2;
    for (int h = 0; h < halves; ++h) {
      uint32_t a[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        load_matrices(a[r], rows_from + chunk_offset(warp_row + r * 16 + lane % 16, 2 * h + lane / 16));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        uint32_t b[4];
        load_matrices(b,
                      codes_from + chunk_offset(warp_code + c * 16 + lane / 16 * 8 + lane % 8, 2 * h + lane / 8 % 2));
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          multiply_add(sums[r][2 * c], a[r], b[0], b[1]);  // rounds: [products], [sum]
          multiply_add(sums[r][2 * c + 1], a[r], b[2], b[3]);
        }
      }
    }

    if (panel == panels - 1) {
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int row = warp_row + r / 2 * 16 + r % 2 * 8 + lane / 4, half = r % 2 * 2;
        float largest[4], top = kNever;  // of four codes each
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float (&first)[4] = sums[r / 2][2 * c], (&second)[4] = sums[r / 2][2 * c + 1];
          largest[c] = fmaxf(fmaxf(first[half], first[half + 1]), fmaxf(second[half], second[half + 1]));
          top = fmaxf(top, largest[c]);
        }
        const float best = from_ordered(relaxed_load(bests[row])), within = reach[row];
        if (!(top >= least_within(best, within))) continue;  // also where reach is NaN
        if (top > best) atomicMax(&bests[row], ordered(top));
        const float least = least_within(fmaxf(best, top), within);
        const int first_code = tile * kTensorCodes + warp_code + lane % 4 * 2;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (!(largest[c] >= least) || largest[c] == kNever) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float score = sums[r / 2][2 * c + i / 2][half + i % 2];
            if (score >= least) lists[row].add(first_code + c * 16 + i / 2 * 8 + i % 2, score);
          }
        }
      }
    }
  }
  __syncthreads();
  if (thread < kTensorRows && first_row + thread < n) {
    const float best = from_ordered(bests[thread]);
    lists[thread].keep(best, least_within(best, reach[thread]), out, blockIdx.y * n + first_row + thread);
  }
}

}  // namespace vqfast
