// Codebook statistics without float atomics: rows sorted by code, each code's rows in their order, then added up in
// pieces of fixed size. The same bits every run.
//
// count: how often each code occurs in each chunk of rows. offsets: where each code's rows of each chunk begin. place:
// row numbers in the order of their codes; within a chunk one warp goes through its rows in order, so the sort is
// stable. sum: 64 sorted rows a block; a code that lies within is done, one that crosses a boundary leaves a partial
// sum. finish: adds the partial sums in order and clears codes without rows. Weights are one more column.
#pragma once

#include "device.cuh"
#include "launch.h"

namespace vqfast {

__device__ __forceinline__ int slot_of(int64_t index, int64_t K) { return index < 0 ? -1 : (int)min(index, K - 1); }

// table: (K, chunks), zero before. One warp a chunk.
static __global__ void stats_count(const int64_t *indices, int64_t N, int64_t K, int64_t chunks, int64_t rows_per_chunk,
                                   int *table) {
  const int64_t chunk = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (chunk >= chunks) return;
  const int64_t end = min((chunk + 1) * rows_per_chunk, N);
  for (int64_t n = chunk * rows_per_chunk + threadIdx.x % 32; n < end; n += 32) {
    const int code = slot_of(indices[n], K);
    if (code >= 0) atomicAdd(table + code * chunks + chunk, 1);
  }
}

// Each code's counts become the number of its rows in the chunks before; totals (K) are its rows. One warp a code.
static __global__ void stats_scan_chunks(int64_t K, int64_t chunks, int *table, int *totals) {
  const int lane = threadIdx.x % 32;
  const int64_t code = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (code >= K) return;
  int before = 0;
  for (int64_t c = 0; c < chunks; c += 32) {
    const int own = c + lane < chunks ? table[code * chunks + c + lane] : 0;
    int upto = own;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int left = __shfl_up_sync(kFullWarp, upto, step);
      if (lane >= step) upto += left;
    }
    if (c + lane < chunks) table[code * chunks + c + lane] = before + upto - own;
    before += __shfl_sync(kFullWarp, upto, 31);
  }
  if (lane == 0) totals[code] = before;
}

// starts (K + 1): where each code's rows begin in sorted order; starts[K] is the number of rows that count. One block.
static __global__ void __launch_bounds__(kScanThreads) stats_scan_codes(int64_t K, const int *totals, int *starts) {
  VQFAST_SHARED(int, warps, [32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t per_thread = (K + kScanThreads - 1) / kScanThreads;
  const int64_t first = min(threadIdx.x * per_thread, K), end = min(first + per_thread, K);
  int own = 0;
  for (int64_t k = first; k < end; ++k) own += totals[k];
  int upto = own;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const int left = __shfl_up_sync(kFullWarp, upto, step);
    if (lane >= step) upto += left;
  }
  if (lane == 31) warps[warp] = upto;
  __syncthreads();
  for (int w = 0; w < warp; ++w) upto += warps[w];
  if (threadIdx.x == kScanThreads - 1) starts[K] = upto;
  int start = upto - own;
  for (int64_t k = first; k < end; ++k) {
    starts[k] = start;
    start += totals[k];
  }
}

// order (N): row numbers sorted by code. One warp a chunk, 32 rows at a time: lanes of one code take consecutive places
// in the order of their rows.
static __global__ void __launch_bounds__(kPlaceThreads)
    stats_place(const int64_t *indices, int64_t N, int64_t K, int64_t chunks, int64_t rows_per_chunk, const int *starts,
                int *table, int *order) {
  const int lane = threadIdx.x % 32;
  const int64_t chunk = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (chunk >= chunks) return;
  const int64_t begin = chunk * rows_per_chunk, end = min(begin + rows_per_chunk, N);
  for (int64_t base = begin; base < end; base += 32) {
    const int64_t n = base + lane;
    const int code = n < end ? slot_of(indices[n], K) : -1;
    const unsigned same = __match_any_sync(kFullWarp, code);
    const int rank = __popc(same & ((1u << lane) - 1));
    const int leader = __ffs((int)same) - 1;
    int next = 0;
    if (lane == leader && code >= 0) {
      next = table[code * chunks + chunk];
      table[code * chunks + chunk] = next + __popc(same);
    }
    next = __shfl_sync(kFullWarp, next, leader);
    if (code >= 0) order[starts[code] + next + rank] = (int)n;
    __syncwarp();  // another lane may lead this code in the next 32 rows
  }
}

// Columns 0..D-1 are the features, column D the weight.
template <typename T>
struct Columns {
  typedef accumulate_t<T> R;
  Rows<T> x;
  const R *weights;  // (N) or null
  int64_t D;
  R *counts, *sums;

  __device__ __forceinline__ void write(int64_t code, int64_t column, R value) const {
    if (column < D)
      sums[code * D + column] = value;
    else
      counts[code] = value;
  }
};

// partial: (pieces, 2, D + 1); slot 0 for a code that began in an earlier piece, 1 for one that begins in this piece
// and goes on.
template <typename T>
__global__ void __launch_bounds__(kSumThreads, 4)
    stats_sum(Columns<T> columns, const int64_t *indices, int64_t K, const int *starts, const int *order,
              accumulate_t<T> *partial) {
  typedef accumulate_t<T> R;
  constexpr int kAhead = 8;  // rows loaded before the first is added
  VQFAST_SHARED(int64_t, offsets, [kPiece]);
  VQFAST_SHARED(int, codes, [kPiece]);
  VQFAST_SHARED(R, weights, [kPiece]);
  const int total = starts[K];
  const int pieces = (total + kPiece - 1) / kPiece;
  for (int piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const int begin = piece * kPiece, length = min(kPiece, total - begin);
    __syncthreads();  // the previous piece may still be read
    for (int i = threadIdx.x; i < length; i += blockDim.x) {
      const int n = order[begin + i];
      offsets[i] = columns.x.offset(n);
      codes[i] = slot_of(indices[n], K);
      weights[i] = columns.weights ? columns.weights[n] : R(1);
    }
    __syncthreads();
    for (int64_t column = (int64_t)blockIdx.y * blockDim.x + threadIdx.x; column <= columns.D;
         column += (int64_t)gridDim.y * blockDim.x) {
      R sum = 0;
      for (int base = 0; base < length; base += kAhead) {
        R values[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          values[j] = 1;
          if (base + j < length && column < columns.D)
            values[j] = widen(columns.x.data[offsets[base + j] + column * columns.x.stride_feature]);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int i = base + j;
          if (i >= length) break;
          sum += weights[i] * values[j];
          const int code = codes[i];
          if (i + 1 < length && codes[i + 1] == code) continue;
          const bool earlier = starts[code]<begin, later = starts[code + 1]> begin + length;
          if (earlier || later)
            partial[((int64_t)piece * 2 + (earlier ? 0 : 1)) * (columns.D + 1) + column] = sum;
          else
            columns.write(code, column, sum);
          sum = 0;
        }
      }
    }
  }
}

template <typename T>
__global__ void stats_finish(Columns<T> columns, int64_t K, const int *starts, const accumulate_t<T> *partial) {
  typedef accumulate_t<T> R;
  const int64_t width = columns.D + 1;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < K * width; i += threads) {
    const int64_t code = i / width, column = i % width;
    const int begin = starts[code], end = starts[code + 1];
    if (begin == end) {
      columns.write(code, column, R(0));
      continue;
    }
    const int64_t first = begin / kPiece, last = (end - 1) / kPiece;
    if (first == last) continue;
    R sum = partial[(first * 2 + 1) * width + column];
#pragma unroll 8
    for (int64_t p = first + 1; p <= last; ++p) sum += partial[p * 2 * width + column];
    columns.write(code, column, sum);
  }
}

}  // namespace vqfast
