// The nearest code of each row, of those that its scores leave, in float64.
#pragma once

#include "exact_distance.h"
#include "nearest_candidates.cuh"
#include "nearest_decide.cuh"

namespace vqfast {

// A code's worth to a row by a warp, in float64, off by at most `slack`: what nearest_exact.h's `estimate` is on the
// CPU.
struct Estimate {
  double worth, slack;
};
template <typename T>
__device__ __forceinline__ Estimate estimate(vqfast_metric metric, const T *x, int64_t stride, const T *c, int64_t D,
                                             double scale_x, double scale_c) {
  const double rounding = 0x1p-53 * ((double)D + 9);
  double sum = 0, magnitude = 0, square = 0;
  if (metric == VQFAST_COSINE) {
    double largest = 0;
    for (int64_t d = threadIdx.x % 32; d < D; d += 32) largest = fmax(largest, fabs((double)widen(c[d])));
    for (int step = 16; step > 0; step >>= 1) largest = fmax(largest, __shfl_xor_sync(kFullWarp, largest, step));
    scale_c = scale_of<double>(size_of(largest));
  }
  for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
    const double a = scale_x * (double)widen(x[d * stride]), b = scale_c * (double)widen(c[d]);
    if (metric == VQFAST_L2) {
      sum += (a - b) * (a - b);
    } else {
      sum += a * b;
      magnitude += fabs(a * b);
      square += b * b;
    }
  }
  sum = warp_sum(sum);
  if (metric == VQFAST_L2) return {-sum, is_finite(sum) ? 2 * rounding * sum : 0};
  magnitude = warp_sum(magnitude);
  if (metric == VQFAST_DOT) return {sum, 1.01 * rounding * magnitude};
  square = warp_sum(square);
  if (square == 0) return {0, 0};
  const double norm = sqrt(square);
  return {sum / norm, 3 * rounding * magnitude / norm};
}

// A warp a row: joins the parts of the codebook, and compares the codes that are left, if there are several. Rows of
// which the scores say nothing, or that have too many of them, stay open for nearest_exact.
template <typename T>
__global__ void nearest_choose(vqfast_metric metric, int exact, Rows<T> x, int64_t first, int64_t n, int64_t D,
                               const T *codebook, int64_t splits, KeptCandidates kept, const float *reaches,
                               SearchState *state, OpenRows open, Found found, int64_t *reranked) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = (int64_t)gridDim.x * (blockDim.x / 32);
  const double scale_codes = comparison_scale(metric, *state), slack = slack_of(metric);
  for (int64_t i = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i < n; i += warps) {
    const int64_t row_number = first + i;
    int64_t &index = found.indices[row_number * found.step];
    if (found.mask != nullptr && !found.mask[row_number * found.step]) {
      if (lane == 0) index = -1;
      continue;
    }
    float best = kNever;
    bool known = reaches[i] >= 0;
    for (int64_t s = 0; s < splits; ++s) best = fmaxf(best, kept.best[s * n + i]);
    const float least = least_within(best, reaches[i]);
    for (int64_t s = 0; s < splits; ++s)
      known = known && (kept.count[s * n + i] <= kKept || kept.best[s * n + i] < least);
    if (!known) {
      if (lane == 0) {
        const unsigned long long at = atomicAdd(&state->open, 1ull);
        open.row[at] = row_number;
        open.threshold[at] = reaches[i] >= 0 ? (double)least : -INFINITY;
      }
      continue;
    }
    const T *row = x.data + x.offset(row_number);
    double scale_x = scale_codes;
    const auto scale_row = [&] {
      if (metric == VQFAST_L2) return;
      double largest = 0;
      for (int64_t d = lane; d < D; d += 32) largest = fmax(largest, fabs((double)widen(row[d * x.stride_feature])));
      for (int step = 16; step > 0; step >>= 1) largest = fmax(largest, __shfl_xor_sync(kFullWarp, largest, step));
      scale_x = scale_of<double>(size_of(largest));
    };
    int winner = -1, candidates = 0;
    Estimate most = {0, 0};  // of the winner, where there is another one
    const auto estimate_of = [&](int k) {
      return estimate(metric, row, x.stride_feature, codebook + k * D, D, scale_x, scale_codes);
    };
    for (int64_t s = 0; s < splits; ++s) {
      for (int j = 0; j < min(kept.count[s * n + i], kKept); ++j) {
        const Candidate candidate = kept.candidates[(s * n + i) * kKept + j];
        if (!(candidate.score >= least)) continue;
        const int k = candidate.code;
        if (++candidates == 1) {
          winner = k;
          continue;
        }
        if (candidates == 2) {
          scale_row();
          most = estimate_of(winner);
        }
        const Estimate own = estimate_of(k);
        bool wins = own.worth - own.slack > most.worth + most.slack;
        if (!wins && own.worth + own.slack >= most.worth - most.slack) {
          // Every lane does the same: it is rare.
          const T *code = codebook + k * D, *other = codebook + winner * D;
          const Double2 a = exact_worth(metric, row, x.stride_feature, code, D, scale_x, scale_codes);
          const Double2 b = exact_worth(metric, row, x.stride_feature, other, D, scale_x, scale_codes);
          wins = nearer({a.high, a.low, k}, {b.high, b.low, winner}, slack);
        }
        if (wins) winner = k, most = own;
      }
    }
    if (lane != 0) continue;
    index = winner < 0 ? 0 : winner;
    if (exact && reranked != nullptr && candidates > 1) atomicAdd((unsigned long long *)reranked, 1ull);
  }
}

}  // namespace vqfast
