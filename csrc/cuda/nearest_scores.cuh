// Scores of every code against every row in float32, the best and second best of each row, and the bound on their error
// that makes a row certain or leaves it open.
#pragma once

#include "nearest_codes.cuh"

namespace vqfast {

// What the scores leave for each row, per part of the codebook: (splits, N).
struct Leaders {
  float *best, *second;
  int *code;
  float *squared_norm;  // (N): ||x^||^2
};

// A newcomer takes the lead only if it scores more, so the first of equals keeps it; a NaN takes nothing, but
// displaces the second, and the row is left open.
__device__ __forceinline__ void challenge(float score, int code, float &best, float &second, int &leader) {
  second = fmaxf(second, fminf(score, best));
  if (score > best) {
    best = score;
    leader = code;
  }
}

// 128 rows against 128 codes at a time, 8 x 8 scores a thread, features in steps of 8 through two buffers.
// Rows beyond N repeat the last row and are not written. kAlongRows: neighbouring threads load neighbouring rows, which
// reads channel-first input in order.
template <typename T, bool kAlongRows>
__global__ void __launch_bounds__(kSearchThreads, kSearchBlocksPerMultiprocessor)
    nearest_scores(vqfast_metric metric, Rows<T> x, int64_t N, int D, CentredCodes codes, const SearchState *state,
                   int64_t row_tiles, int code_tiles, int tiles_per_split, Leaders out) {
  constexpr int kPitch = kTileRows + 4;  // keeps 16-byte reads aligned, and column writes off each other's banks
  VQFAST_SHARED(float4, x_tile, [2][kTileFeatures][kPitch / 4]);
  VQFAST_SHARED(float4, c_tile, [2][kTileFeatures][kTileCodes / 4]);
  VQFAST_SHARED(int64_t, offsets, [kTileRows]);
  // The leaders that each thread has met, in shared memory because registers are short; no thread reads another's.
  VQFAST_SHARED(float, best, [8][kSearchThreads]);
  VQFAST_SHARED(float, second, [8][kSearchThreads]);
  VQFAST_SHARED(int, leader, [8][kSearchThreads]);
  VQFAST_SHARED(typename ScaleOf<T>::type, scale, [1]);  // for want of a register
  const int thread = threadIdx.x, tx = thread % 16, ty = thread / 16;
  // What this thread loads: element i of the tile is (row, feature) + i * (row_step, feature_step).
  const int load_row = kAlongRows ? thread % kTileRows : thread / kTileFeatures;
  const int load_feature = kAlongRows ? thread / kTileRows : thread % kTileFeatures;
  constexpr int row_step = kAlongRows ? 0 : kSearchThreads / kTileFeatures;
  constexpr int feature_step = kAlongRows ? kSearchThreads / kTileRows : 0;
  const int code_feature = thread / (kTileCodes / 4), code_column = thread % (kTileCodes / 4);

  const int first_tile = blockIdx.y * tiles_per_split;
  const int tiles = min(tiles_per_split, code_tiles - first_tile);
  const int steps_per_tile = (D + kTileFeatures - 1) / kTileFeatures;
  const int steps = tiles * steps_per_tile;
  if (thread == 0) *scale = row_scale<T>(metric, *state);

  for (int64_t row_tile = blockIdx.x; row_tile < row_tiles; row_tile += gridDim.x) {
    const int64_t first_row = row_tile * kTileRows;
    // What was read for the previous rows was read before the last barrier of their steps.
    if (thread < kTileRows) offsets[thread] = x.offset(min(first_row + thread, N - 1));
    __syncthreads();

    float x_next[4];
    float4 c_next;
    int fetched = 0;  // steps of the current tile
    const float *c_from = codes.codes + code_feature * codes.pitch + first_tile * (int64_t)kTileCodes + code_column * 4;
    const T *x_from = x.data + load_feature * x.stride_feature + (kAlongRows ? offsets[load_row] : 0);
    const auto fetch = [&] {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = fetched * kTileFeatures + load_feature + i * feature_step;
        x_next[i] = 0;
        if (d < D)
          x_next[i] =
              centred(x_from[kAlongRows ? i * feature_step * x.stride_feature : offsets[load_row + i * row_step]],
                      codes.row_centre[d], *scale);
      }
      c_next = *reinterpret_cast<const float4 *>(c_from);
      c_from += kTileFeatures * codes.pitch;
      x_from += kTileFeatures * x.stride_feature;
      if (++fetched == steps_per_tile) {
        fetched = 0;
        c_from += kTileCodes - steps_per_tile * kTileFeatures * codes.pitch;
        x_from -= steps_per_tile * kTileFeatures * x.stride_feature;
      }
    };
    const auto put = [&](int buffer) {
      float *to = reinterpret_cast<float *>(x_tile[buffer]);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(load_feature + i * feature_step) * kPitch + load_row + i * row_step] = x_next[i];
      c_tile[buffer][code_feature][code_column] = c_next;
    };

    float dot[8][8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      best[r][thread] = second[r][thread] = kNever;
      leader[r][thread] = 0;
#pragma unroll
      for (int c = 0; c < 8; ++c) dot[r][c] = 0;
    }
    float squared_norm = 0;

    fetch();
    put(0);
    __syncthreads();
    int summed = 0;  // steps of the current tile
    int first_code = first_tile * kTileCodes;
    for (int step = 0; step < steps; ++step) {
      const int buffer = step & 1;
      const bool more = step + 1 < steps;
      if (more) fetch();

      // By four: fully unrolled, what is read ahead no longer fits the registers that two blocks leave each other.
#pragma unroll 4
      for (int f = 0; f < kTileFeatures; ++f) {
        const float4 xs[2] = {x_tile[buffer][f][ty], x_tile[buffer][f][16 + ty]};
        const float4 cs[2] = {c_tile[buffer][f][tx], c_tile[buffer][f][16 + tx]};
        const float xv[8] = {xs[0].x, xs[0].y, xs[0].z, xs[0].w, xs[1].x, xs[1].y, xs[1].z, xs[1].w};
        const float cv[8] = {cs[0].x, cs[0].y, cs[0].z, cs[0].w, cs[1].x, cs[1].y, cs[1].z, cs[1].w};
#pragma unroll
        for (int r = 0; r < 8; ++r)
#pragma unroll
          for (int c = 0; c < 8; ++c) dot[r][c] = fmaf(xv[r], cv[c], dot[r][c]);  // rounds: [products]
      }
      if (first_code == 0 && thread < kTileRows) {
        const float *row = reinterpret_cast<const float *>(x_tile[buffer]) + thread;
#pragma unroll
        for (int f = 0; f < kTileFeatures; ++f) squared_norm = fmaf(row[f * kPitch], row[f * kPitch], squared_norm);
      }

      if (++summed == steps_per_tile) {
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          float row_best = best[r][thread], row_second = second[r][thread];
          int row_leader = leader[r][thread];
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            const int code = first_code + (c < 4 ? 0 : 64 - 4) + tx * 4 + c;
            challenge(dot[r][c] + codes.bias[code], code, row_best, row_second, row_leader);  // rounds: [sum]
            dot[r][c] = 0;
          }
          best[r][thread] = row_best;
          second[r][thread] = row_second;
          leader[r][thread] = row_leader;
        }
        summed = 0;
        first_code += kTileCodes;
      }
      if (more) put(buffer ^ 1);
      __syncthreads();
    }

    // The 16 threads that share these rows.
    for (int r = 0; r < 8; ++r) {
      float row_best = best[r][thread], row_second = second[r][thread];
      int row_leader = leader[r][thread];
#pragma unroll
      for (int other = 8; other > 0; other >>= 1) {
        const float their_best = __shfl_xor_sync(kFullWarp, row_best, other);
        const float their_second = __shfl_xor_sync(kFullWarp, row_second, other);
        const int their_leader = __shfl_xor_sync(kFullWarp, row_leader, other);
        row_second = fmaxf(fmaxf(row_second, their_second), fminf(row_best, their_best));
        if (their_best > row_best || (their_best == row_best && their_leader < row_leader)) {
          row_best = their_best;
          row_leader = their_leader;
        }
      }
      const int64_t n = first_row + (r < 4 ? 0 : 64 - 4) + ty * 4 + r;
      if (tx == 0 && n < N) {
        out.best[blockIdx.y * N + n] = row_best;
        out.second[blockIdx.y * N + n] = row_second;
        out.code[blockIdx.y * N + n] = row_leader;
      }
    }
    if (first_tile == 0 && thread < kTileRows && first_row + thread < N)
      out.squared_norm[first_row + thread] = squared_norm;
  }
}

// B(x): no computed score differs from s_k by more. Infinite, so that no row is certain, where a score may overflow.
//
// X = ||x^||, C = max ||c^_k||, rounded up; u = 2^-24, gamma_n = n u / (1 - n u). Each product x^_d c^_kd carries the
// roundings of its two factors [centring], at most D of the multiply-add chain [products] and that of [sum]: with one
// more for taking X and C of rounded vectors, gamma_{D+4} sum |x^_d c^_kd| <= gamma_{D+4} X C. The other term of the
// score, which distances have, carries [bias], [sum] and the float64 roundings of the norm: gamma_3 C^2 / 2. Codes of
// unit length are rounded before they are centred: X unit_error [units]. What underflows adds at most 2^-149 an
// operation.
__device__ inline double score_error_bound(vqfast_metric metric, int64_t D, float squared_norm,
                                           const SearchState &state) {
  constexpr double u = 0x1p-24;
  const double steps = (double)D + 4;
  if (steps * u > 0.5) return INFINITY;
  const double gamma = steps * u / (1 - steps * u);
  // squared_norm is itself a float32 chain of D steps.
  const double X = sqrt((double)squared_norm / (1 - gamma) + steps * 0x1p-149), C = __int_as_float(state.largest_norm);
  if (!(X * C + C * C < 1e37)) return INFINITY;
  const double half_square = metric == VQFAST_L2 ? 0.5 * C * C : 0, units = X * __int_as_float(state.unit_error);
  return (gamma * X * C + 3.1 * u * half_square + units) * (1 + 1e-6) + 0x1p-140 * steps * (1 + X + C);
}

// Rows that the scores leave open.
struct OpenRows {
  int64_t *row;
  double *threshold;  // a code that scores less cannot be the nearest
};

// The results of one head: a row's is at `step` times its number. mask, or null: 0 where a row does not count.
struct Found {
  int64_t *indices;
  const uint8_t *mask;
  int64_t step;
};

// One thread a row: joins the parts of the codebook, then writes the index or leaves the row open.
static __global__ void nearest_certify(vqfast_metric metric, int exact, int64_t N, int64_t D, int64_t splits,
                                       Leaders leaders, SearchState *state, OpenRows open, Found found) {
  for (int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; n < N; n += (int64_t)gridDim.x * blockDim.x) {
    int64_t &index = found.indices[n * found.step];
    if (found.mask != nullptr && !found.mask[n * found.step]) {
      index = -1;
      continue;
    }
    float best = kNever, second = kNever;
    int code = 0;
    for (int64_t s = 0; s < splits; ++s) {
      challenge(leaders.best[s * N + n], leaders.code[s * N + n], best, second, code);
      second = fmaxf(second, leaders.second[s * N + n]);
    }
    if (!exact) {
      index = is_finite(best) ? code : 0;
      continue;
    }
    const double bound = score_error_bound(metric, D, leaders.squared_norm[n], *state);
    // False as well where anything is NaN or infinite.
    if (is_finite(best) && (double)best - (double)second > 2 * bound) {
      index = code;
    } else {
      const unsigned long long at = atomicAdd(&state->open, 1ull);
      open.row[at] = n;
      open.threshold[at] = is_finite(best) && is_finite(bound) ? (double)best - 2 * bound : -INFINITY;
    }
  }
}

}  // namespace vqfast
