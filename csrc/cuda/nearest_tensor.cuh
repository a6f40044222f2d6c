// Scores by tensor cores: rows and codes rounded to bfloat16, their products summed in float32, and of every row the few
// cells of four codes that can hold its nearest one. Nothing of a row is scored twice: which of those codes it is, is
// decided in float64 (nearest_choose).
//
// Lines that round are marked with the name of their term in `tensor_error_bound`.
#pragma once

#include "exact_distance.h"
#include "nearest_decide.cuh"
#include "tensor_core.cuh"

namespace vqfast {

// Vectors as the products read them: bfloat16, (n, pitch), zero beyond D.
struct PackedVectors {
  bf16 *values;
  int pitch;  // a multiple of 16
};

// Maxima over the codes, as bits of floats, rounded up: ||c^||, ||v||, ||v - c^||. All zero at first.
struct TensorFacts {
  int rounded, exact, residual;
};

__device__ __forceinline__ float rounded_up(double v) { return (float)(v * (1 + 0x1p-20)); }

// Squared, of one vector: as packed, before it was rounded, of the difference.
struct TensorNorms {
  double rounded, exact, residual;
};
// value(d), d < D, to bfloat16, by a warp.
template <typename Value>
__device__ __forceinline__ TensorNorms pack_vector(bf16 *to, int pitch, int64_t D, Value value) {
  TensorNorms norms = {0, 0, 0};
  for (int d = threadIdx.x % 32; d < pitch; d += 32) {
    const double v = d < D ? value(d) : 0;
    bf16 packed;
    narrow((float)v, packed);  // rounds: [inputs]
    to[d] = packed;
    const double back = (double)widen(packed), rest = v - back;
    norms.rounded += back * back;
    norms.exact += v * v;
    norms.residual += rest * rest;
  }
  return {warp_sum(norms.rounded), warp_sum(norms.exact), warp_sum(norms.residual)};
}

// A warp a code. bias: as in nearest_codes, which has written it; a code that is not finite is all zeros.
template <typename T>
__global__ void nearest_tensor_codes(vqfast_metric metric, const T *codebook, int64_t D, int64_t padded_codes,
                                     CentredCodes codes, PackedVectors out, const SearchState *state,
                                     TensorFacts *facts) {
  const int64_t k = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (k >= padded_codes) return;
  const bool taken = codes.bias[k] != kNever;
  const double factor = metric != VQFAST_COSINE ? scale_of<T>(state->code_size) : taken ? codes.factors[k] : 0;
  const TensorNorms norms = pack_vector(out.values + k * out.pitch, out.pitch, taken ? D : 0, [&](int d) {
    return ((double)widen(codebook[k * D + d]) - (double)codes.centre[d]) * factor;
  });
  if (threadIdx.x % 32 != 0 || !taken) return;
  atomicMax(&facts->rounded, __float_as_int(rounded_up(sqrt(norms.rounded))));
  atomicMax(&facts->exact, __float_as_int(rounded_up(sqrt(norms.exact))));
  atomicMax(&facts->residual, __float_as_int(rounded_up(sqrt(norms.residual))));
}

// B(x): no score differs from its real value by more; the terms of kernels/nearest/README.md. Tensor cores may truncate
// where float32 rounds, and keep fewer bits while they align what they add: u is 2^-22 here.
__device__ inline double tensor_error_bound(vqfast_metric metric, int64_t D, const TensorNorms &row,
                                            const TensorFacts &facts) {
  constexpr double u = 0x1p-22;
  const double steps = (double)D + 20, gamma = steps * u / (1 - steps * u);
  const double x = sqrt(row.rounded), rest = sqrt(row.residual);
  const double rounded = __int_as_float(facts.rounded), exact = __int_as_float(facts.exact);
  const double residual = __int_as_float(facts.residual);
  if (!(x * rounded + exact * exact < 1e37)) return INFINITY;
  const double half_square = metric == VQFAST_L2 ? 0.5 * exact * exact : 0;
  const double sums = gamma * (x * rounded + half_square);   // [products], [bias], [sum]
  const double inputs = rest * exact + x * residual;         // [inputs]
  // Unit codes are rounded in float64 before they are packed.
  const double units = metric == VQFAST_COSINE ? (steps + 8) * 0x1p-53 * (x + rest) : 0;
  return (sums + inputs + units) * (1 + 1e-6) + 0x1p-118 * steps * (1 + x + exact);
}

// A warp a row of the n from `first` on. reach: how far below the best of its scores that of its nearest code can lie,
// rounded up; NaN where scores say nothing.
template <typename T>
__global__ void nearest_tensor_rows(vqfast_metric metric, int exact, Rows<T> x, int64_t first, int64_t n, int64_t D,
                                    CentredCodes codes, const SearchState *state, const TensorFacts *facts,
                                    PackedVectors out, float *reach) {
  const double scale = row_scale<T>(metric, *state);
  const int64_t warps = (int64_t)gridDim.x * (blockDim.x / 32);
  for (int64_t i = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i < n; i += warps) {
    const T *row = x.data + x.offset(first + i);
    const TensorNorms norms = pack_vector(out.values + i * out.pitch, out.pitch, D, [&](int d) {
      return ((double)widen(row[d * x.stride_feature]) - (double)codes.centre[d]) * scale;
    });
    if (threadIdx.x % 32 != 0) continue;
    const double bound = tensor_error_bound(metric, D, norms, *facts);
    reach[i] = !(bound < INFINITY) ? NAN : exact ? rounded_up(2 * bound) : 0;
  }
}

// Floats as integers of the same order.
__device__ __forceinline__ int ordered(float v) {
  const int bits = __float_as_int(v);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(int v) { return __int_as_float(v ^ (v >> 31 & 0x7fffffff)); }

// The least score within reach of the best one; rounded down.
__device__ __forceinline__ float least_within(float best, float reach) {
  const float least = best - reach;
  return least - fabsf(least) * 0x1p-22f - 0x1p-126f;
}

// Four codes that one thread scores for a row, and the largest of their scores.
struct Cell {
  int number;
  float score;
};
__device__ __forceinline__ int code_of(int cell, int member) {
  const int tile = cell / (kTensorCodes / 4), rest = cell % (kTensorCodes / 4);
  return tile * kTensorCodes + rest / 4 * 16 + rest % 4 * 2 + member % 2 + member / 2 * 8;
}

// What the scores leave of each row, per part of the codebook: (splits, n) and (splits, n, kKeptCells).
struct KeptCells {
  float *best;
  int *count;  // above kKeptCells: too many
  Cell *cells;
};

// A block's kTensorRows rows stay in shared memory; the codes come kTensorCodes at a time, 64 features a step, through a ring
// of kStages. A warp has the scores of 64 rows and 64 codes in registers. Rows beyond n repeat the last one and are not
// written.
template <int kStages>
__global__ void __launch_bounds__(kSearchThreads, 1)
    nearest_tensor_scores(PackedVectors x, int64_t n, PackedVectors codes, const float *bias, const float *reaches,
                          int code_tiles, int tiles_per_split, KeptCells out) {
  VQFAST_DYNAMIC_SHARED(tiles);
  VQFAST_SHARED(Cell, lists, [kTensorRows][kListedCells]);
  VQFAST_SHARED(int, counts, [kTensorRows]);
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
    counts[thread] = 0;
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
    const bool crowded =
        panel == 0 && thread < kTensorRows && relaxed_load(counts[thread]) > kListedCells / 2;
    if (__syncthreads_or(crowded)) {
      if (crowded) {
        const float least = least_within(from_ordered(bests[thread]), reach[thread]);
        int kept = 0;
        for (int i = 0; i < min(counts[thread], kListedCells); ++i)
          if (lists[thread][i].score >= least) lists[thread][kept++] = lists[thread][i];
        // One that has overflowed has lost a cell for good.
        counts[thread] = counts[thread] > kListedCells ? kListedCells + 1 : kept;
      }
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
        load_matrices(b, codes_from + chunk_offset(warp_code + c * 16 + lane / 16 * 8 + lane % 8, 2 * h + lane / 8 % 2));
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          multiply_add(sums[r][2 * c], a[r], b[0], b[1]);          // rounds: [products], [sum]
          multiply_add(sums[r][2 * c + 1], a[r], b[2], b[3]);
        }
      }
    }

    if (panel == panels - 1) {
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int row = warp_row + r / 2 * 16 + r % 2 * 8 + lane / 4, half = r % 2 * 2;
        float cell[4], top = kNever;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float(&first)[4] = sums[r / 2][2 * c], (&second)[4] = sums[r / 2][2 * c + 1];
          cell[c] = fmaxf(fmaxf(first[half], first[half + 1]), fmaxf(second[half], second[half + 1]));
          top = fmaxf(top, cell[c]);
        }
        const float best = from_ordered(relaxed_load(bests[row])), within = reach[row];
        if (!(top >= least_within(best, within))) continue;  // also where reach is NaN
        if (top > best) atomicMax(&bests[row], ordered(top));
        const float least = least_within(fmaxf(best, top), within);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (!(cell[c] >= least) || cell[c] == kNever) continue;
          const int at = atomicAdd(&counts[row], 1);
          if (at < kListedCells) lists[row][at] = {tile * (kTensorCodes / 4) + warp_code / 4 + c * 4 + lane % 4, cell[c]};
        }
      }
    }
  }
  __syncthreads();
  if (thread < kTensorRows && first_row + thread < n) {
    const int64_t at = blockIdx.y * n + first_row + thread;
    const float best = from_ordered(bests[thread]), least = least_within(best, reach[thread]);
    int kept = 0;
    for (int i = 0; i < min(counts[thread], kListedCells); ++i) {
      if (!(lists[thread][i].score >= least)) continue;
      if (kept < kKeptCells) out.cells[at * kKeptCells + kept] = lists[thread][i];
      ++kept;
    }
    out.best[at] = best;
    out.count[at] = counts[thread] > kListedCells ? kKeptCells + 1 : kept;
  }
}

// A code's worth to a row by a warp, in float64, off by at most `slack`: what nearest_exact.h's `estimate` is on the CPU.
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

// A warp a row: joins the parts of the codebook, and compares the codes of the cells that are left. Rows of which the
// scores say nothing, or that have too many cells, stay open for nearest_exact.
template <typename T>
__global__ void nearest_choose(vqfast_metric metric, int exact, Rows<T> x, int64_t first, int64_t n, int64_t D,
                               const T *codebook, int64_t K, int64_t splits, const float *bias, KeptCells kept,
                               const float *reaches, SearchState *state, OpenRows open, Found found, int64_t *reranked) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = (int64_t)gridDim.x * (blockDim.x / 32);
  const double scale_codes = scale_of<double>(state->code_size), slack = slack_of(metric);
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
      known = known && (!exact || kept.count[s * n + i] <= kKeptCells || kept.best[s * n + i] < least);
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
    if (metric != VQFAST_L2) {
      double largest = 0;
      for (int64_t d = lane; d < D; d += 32) largest = fmax(largest, fabs((double)widen(row[d * x.stride_feature])));
      for (int step = 16; step > 0; step >>= 1) largest = fmax(largest, __shfl_xor_sync(kFullWarp, largest, step));
      scale_x = scale_of<double>(size_of(largest));
    }
    int winner = -1, cells = 0;
    Estimate most = {0, 0};
    for (int64_t s = 0; s < splits; ++s) {
      for (int j = 0; j < min(kept.count[s * n + i], kKeptCells); ++j) {
        const Cell cell = kept.cells[(s * n + i) * kKeptCells + j];
        if (!(cell.score >= least)) continue;
        ++cells;
        for (int member = 0; member < 4; ++member) {
          const int k = code_of(cell.number, member);
          if (k >= K || bias[k] == kNever) continue;
          const T *code = codebook + k * D;
          const Estimate own = estimate(metric, row, x.stride_feature, code, D, scale_x, scale_codes);
          bool wins = winner < 0 || own.worth - own.slack > most.worth + most.slack;
          if (!wins && own.worth + own.slack >= most.worth - most.slack) {
            // Every lane does the same: it is rare.
            const Double2 a = exact_worth(metric, row, x.stride_feature, code, D, scale_x, scale_codes);
            const Double2 b =
                exact_worth(metric, row, x.stride_feature, codebook + winner * D, D, scale_x, scale_codes);
            wins = nearer({a.high, a.low, k}, {b.high, b.low, winner}, slack);
          }
          if (wins) winner = k, most = own;
        }
      }
    }
    if (lane != 0) continue;
    index = winner < 0 ? 0 : winner;
    if (exact && reranked != nullptr && cells > 1) atomicAdd((unsigned long long *)reranked, 1ull);
  }
}

}  // namespace vqfast
