// The rows that the scores leave open: every code that scores enough, in twice float64, in parts of the codebook; then
// the winners of the parts.
#pragma once

#include "exact_distance.h"
#include "nearest_scores.cuh"

namespace vqfast {

// The nearest code of a part of the codebook; code < 0: none of a finite worth.
struct Nearest {
  double high, low;  // its worth: minus the distance, the product, or the signed square of the cosine
  int code;
};

// slack: 0, or kEqualCosines.
__device__ __forceinline__ bool nearer(const Nearest &a, const Nearest &b, double slack) {
  if (a.code < 0 || b.code < 0) return b.code < 0 && a.code >= 0;
  const Double2 worth_a = {a.high, a.low}, worth_b = {b.high, b.low};
  return exceeds(worth_a, worth_b, slack) || (!exceeds(worth_b, worth_a, slack) && a.code < b.code);
}

__device__ __forceinline__ double slack_of(vqfast_metric metric) { return metric == VQFAST_COSINE ? kEqualCosines : 0; }

// What code c is worth to a row, in twice float64. Scales keep float64 values from overflow: of the row, and of the
// code unless cosines are compared, which take one of their own.
template <typename T>
__device__ __forceinline__ Double2 exact_worth(vqfast_metric metric, const T *x, int64_t stride, const T *c, int64_t D,
                                               double scale_x, double scale_c) {
  Double2 sum = {0, 0}, square = {0, 0};
  if (metric == VQFAST_L2) {
    for (int64_t d = 0; d < D; ++d)
      sum = add_squared_difference(sum, scale_x * (double)widen(x[d * stride]), scale_c * (double)widen(c[d]));
    return {-sum.high, -sum.low};
  }
  if (metric == VQFAST_COSINE) {
    double largest = 0;
    for (int64_t d = 0; d < D; ++d) largest = fmax(largest, fabs((double)widen(c[d])));
    scale_c = scale_of<double>(size_of(largest));
  }
  for (int64_t d = 0; d < D; ++d) {
    const double value = scale_c * (double)widen(c[d]);
    sum = add_product(sum, scale_x * (double)widen(x[d * stride]), value);
    if (metric == VQFAST_COSINE) square = add_product(square, value, value);
  }
  return metric == VQFAST_COSINE ? signed_square_cosine(sum, square) : sum;
}

// Into how many parts the codebook is cut for each open row: enough to fill a grid of `blocks`. At most open + 2
// blocks parts come out over all rows.
__device__ __forceinline__ int64_t exact_parts(int64_t open, int64_t blocks, int64_t code_blocks) {
  const int64_t parts = (2 * blocks + open - 1) / open;
  return parts < code_blocks ? parts : code_blocks;
}

// Open rows, by exact distance among the codes that score enough. The grid is fixed and reads the number of open rows
// on the device; a block takes one part of the codebook for one row, 256 codes at a time.
template <typename T>
__global__ void __launch_bounds__(kSearchThreads, 1)
    nearest_exact(vqfast_metric metric, Rows<T> x, int64_t D, const T *codebook, int64_t K, CentredCodes codes,
                  const SearchState *state, OpenRows open, Nearest *nearest) {
  VQFAST_SHARED(float, row, [kSearchThreads]);
  VQFAST_SHARED(double, partial, [32]);
  VQFAST_SHARED(Nearest, warps, [32]);
  const int64_t rows = (int64_t)state->open;
  if (rows == 0) return;
  const int64_t code_blocks = (K + kSearchThreads - 1) / kSearchThreads;
  const int64_t parts = exact_parts(rows, gridDim.x, code_blocks);
  const int64_t blocks_per_part = (code_blocks + parts - 1) / parts;
  const int thread = threadIdx.x;
  const typename ScaleOf<T>::type scale = row_scale<T>(metric, *state);
  const double scale_c = comparison_scale(metric, *state), slack = slack_of(metric);

  for (int64_t item = blockIdx.x; item < rows * parts; item += gridDim.x) {
    const int64_t entry = item / parts, part = item % parts;
    const int64_t from = x.offset(open.row[entry]);
    const double threshold = open.threshold[entry];
    Nearest mine = {INFINITY, 0, -1};

    double largest = 0;
    for (int64_t d = thread; d < D; d += kSearchThreads) {
      const T v = x.data[from + d * x.stride_feature];
      largest = fmax(largest, is_finite(v) ? fabs((double)widen(v)) : (double)INFINITY);
    }
    largest = block_reduce(largest, Max(), partial);
    const bool finite = is_finite(largest);
    const double scale_x = metric == VQFAST_L2 ? scale_c : scale_of<double>(size_of(largest));
    const int64_t end = (part + 1) * blocks_per_part < code_blocks ? (part + 1) * blocks_per_part : code_blocks;
    // A row that is not finite is worth nothing finite to any code.
    for (int64_t block = part * blocks_per_part; block < end && finite; ++block) {
      const int64_t k = block * kSearchThreads + thread;
      float dot = 0;
      for (int64_t d0 = 0; d0 < D; d0 += kSearchThreads) {
        __syncthreads();
        if (d0 + thread < D)
          row[thread] = centred(x.data[from + (d0 + thread) * x.stride_feature], codes.row_centre[d0 + thread], scale);
        __syncthreads();
        const int count = D - d0 < kSearchThreads ? (int)(D - d0) : kSearchThreads;
        if (k < K)
          for (int i = 0; i < count; ++i) dot = fmaf(row[i], codes.codes[(d0 + i) * codes.pitch + k], dot);
      }
      // A score that is NaN is no reason to leave a code out.
      if (k >= K || (double)(dot + codes.bias[k]) < threshold) continue;
      if (codes.bias[k] == kNever) continue;
      const Double2 worth = exact_worth(metric, x.data + from, x.stride_feature, codebook + k * D, D, scale_x, scale_c);
      const Nearest candidate = {worth.high, worth.low, (int)k};
      if (is_finite(worth.high) && nearer(candidate, mine, slack)) mine = candidate;
    }

#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
      const Nearest other = {__shfl_xor_sync(kFullWarp, mine.high, step), __shfl_xor_sync(kFullWarp, mine.low, step),
                             __shfl_xor_sync(kFullWarp, mine.code, step)};
      if (nearer(other, mine, slack)) mine = other;
    }
    if (thread % 32 == 0) warps[thread / 32] = mine;
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < kSearchThreads / 32; ++w)
        if (nearer(warps[w], mine, slack)) mine = warps[w];
      nearest[item] = mine;
    }
    // The next item writes `row` and `warps` only after the barriers of its block_reduce.
  }
}

// One thread an open row: joins its parts. A row to which no code is worth anything finite gets code 0.
static __global__ void nearest_decide(vqfast_metric metric, int64_t K, int64_t exact_blocks, const SearchState *state,
                                      OpenRows open, const Nearest *nearest, Found found, int64_t *reranked) {
  const int64_t rows = (int64_t)state->open;
  if (reranked != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *reranked += rows;
  if (rows == 0) return;
  const int64_t parts = exact_parts(rows, exact_blocks, (K + kSearchThreads - 1) / kSearchThreads);
  for (int64_t entry = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; entry < rows;
       entry += (int64_t)gridDim.x * blockDim.x) {
    Nearest winner = nearest[entry * parts];
    for (int64_t p = 1; p < parts; ++p)
      if (nearer(nearest[entry * parts + p], winner, slack_of(metric))) winner = nearest[entry * parts + p];
    found.indices[open.row[entry] * found.step] = winner.code < 0 ? 0 : winner.code;
  }
}

}  // namespace vqfast
