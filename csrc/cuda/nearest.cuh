// Exact nearest-code search: float32 scores, a bound on their error, exact distances where the bound does not decide.
//
// With u = x - m and v_k = c_k - m for a common centre m, the nearest code has the largest score s_k = u . v_k -
// 1/2 ||v_k||^2. Six kernels: the centre; the codes, centred and transposed; the scores, best and second of each row;
// certainty, from the error bound; the rows that stay open, by exact distance in parts of the codebook; their winners.
// Lines that round are marked with the name of their term in `score_error_bound`.
#pragma once

#include "device.cuh"
#include "exact_distance.h"
#include "launch.h"

namespace vqfast {

constexpr float kNever = -INFINITY;

struct SearchState {
  unsigned long long open;  // rows left open
  int largest_norm;         // bits of a float, >= every ||c^_k||: floats from 0 up have the order of their bits
};

// The codes as the scores read them.
struct CentredCodes {
  float *centre;  // (D)
  float *codes;   // (padded D, padded K): zero beyond D and K and where a code is not finite
  float *bias;    // (padded K): -1/2 ||v_k||^2; kNever beyond K and where a code is not finite
  int64_t pitch;  // padded K
};

template <typename T>
__device__ __forceinline__ bool is_finite(T v) {
  return widen(v) - widen(v) == 0;
}

// (x - m) to float32. Rounds once: [centring].
__device__ __forceinline__ float centred(float v, float centre) { return v - centre; }
__device__ __forceinline__ float centred(double v, float centre) { return (float)(v - (double)centre); }
__device__ __forceinline__ float centred(bf16 v, float centre) { return widen(v) - centre; }
__device__ __forceinline__ float centred(f16 v, float centre) { return widen(v) - centre; }

// Mean of up to 256 codes at even distances. Its value only tightens the bound: any centre gives a right result.
// A block of 32 x 8 threads for 32 features.
template <typename T>
__global__ void nearest_centre(const T *codebook, int64_t K, int64_t D, float *centre, SearchState *state) {
  VQFAST_SHARED(double, sums, [8][32]);
  VQFAST_SHARED(int, counts, [8][32]);
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t d = (int64_t)blockIdx.x * 32 + lane;
  if (blockIdx.x == 0 && threadIdx.x == 0) *state = {0, 0};
  double sum = 0;
  int count = 0;
  const int64_t samples = K < 256 ? K : 256;
  for (int64_t i = part; i < samples; i += 8) {
    if (d >= D) break;
    const T v = codebook[i * K / samples * D + d];
    if (is_finite(v)) {
      sum += (double)widen(v);
      ++count;
    }
  }
  sums[part][lane] = sum;
  counts[part][lane] = count;
  __syncthreads();
  if (part != 0 || d >= D) return;
  for (int i = 1; i < 8; ++i) {
    sum += sums[i][lane];
    count += counts[i][lane];
  }
  const float mean = (float)(sum / (count > 0 ? count : 1));
  centre[d] = is_finite(mean) ? mean : 0.0f;
}

// Centres and transposes 32 codes a block, 32 features at a time.
template <typename T>
__global__ void nearest_codes(const T *codebook, int64_t K, int64_t D, int64_t padded_features, CentredCodes out,
                              SearchState *state) {
  VQFAST_SHARED(T, tile, [32][33]);
  VQFAST_SHARED(double, norms, [2][8][32]);
  VQFAST_SHARED(int, broken, [8][32]);
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t first = (int64_t)blockIdx.x * 32, k = first + lane;
  double norm = 0, exact_norm = 0;
  int not_finite = 0;
  for (int64_t d0 = 0; d0 < padded_features; d0 += 32) {
    for (int i = part; i < 32; i += 8)
      if (first + i < K && d0 + lane < D) tile[i][lane] = codebook[(first + i) * D + d0 + lane];
    __syncthreads();
    for (int j = part; j < 32; j += 8) {
      const int64_t d = d0 + j;
      if (d >= padded_features) break;
      float value = 0;
      if (k < K && d < D) {
        const T v = tile[lane][j];
        if (is_finite(v)) {
          const double exact = (double)widen(v) - (double)out.centre[d];
          value = centred(v, out.centre[d]);
          norm += (double)value * value;
          exact_norm += exact * exact;
        } else {
          not_finite = 1;
        }
      }
      out.codes[d * out.pitch + k] = value;
    }
    __syncthreads();
  }
  norms[0][part][lane] = norm;
  norms[1][part][lane] = exact_norm;
  broken[part][lane] = not_finite;
  __syncthreads();
  if (part != 0) return;
  for (int i = 1; i < 8; ++i) {
    norm += norms[0][i][lane];
    exact_norm += norms[1][i][lane];
    not_finite |= broken[i][lane];
  }
  const bool taken = k < K && !not_finite;
  out.bias[k] = taken ? (float)(-0.5 * exact_norm) : kNever;  // rounds: [bias]
  // Rounded up. Infinite where the code leaves float32's range: then no row is certain.
  if (taken) atomicMax(&state->largest_norm, __float_as_int((float)(sqrt(norm) * (1 + 0x1p-20))));
}

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
    nearest_scores(Rows<T> x, int64_t N, int D, CentredCodes codes, int64_t row_tiles, int code_tiles,
                   int tiles_per_split, Leaders out) {
  constexpr int kPitch = kTileRows + 4;  // keeps 16-byte reads aligned, and column writes off each other's banks
  VQFAST_SHARED(float4, x_tile, [2][kTileFeatures][kPitch / 4]);
  VQFAST_SHARED(float4, c_tile, [2][kTileFeatures][kTileCodes / 4]);
  VQFAST_SHARED(int64_t, offsets, [kTileRows]);
  // The leaders that each thread has met, in shared memory because registers are short; no thread reads another's.
  VQFAST_SHARED(float, best, [8][kSearchThreads]);
  VQFAST_SHARED(float, second, [8][kSearchThreads]);
  VQFAST_SHARED(int, leader, [8][kSearchThreads]);
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
                      codes.centre[d]);
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
      for (int i = 0; i < 4; ++i)
        to[(load_feature + i * feature_step) * kPitch + load_row + i * row_step] = x_next[i];
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
// score carries [bias], [sum] and the float64 roundings of the norm: gamma_3 C^2 / 2. What underflows adds at most
// 2^-149 an operation.
__device__ inline double score_error_bound(int64_t D, float squared_norm, float largest_norm) {
  constexpr double u = 0x1p-24;
  const double steps = (double)D + 4;
  if (steps * u > 0.5) return INFINITY;
  const double gamma = steps * u / (1 - steps * u);
  // squared_norm is itself a float32 chain of D steps.
  const double X = sqrt((double)squared_norm / (1 - gamma) + steps * 0x1p-149), C = largest_norm;
  if (!(X * C + C * C < 1e37)) return INFINITY;
  return (gamma * X * C + 3.1 * u * 0.5 * C * C) * (1 + 1e-6) + 0x1p-140 * steps * (1 + X + C);
}

// Rows that the scores leave open.
struct OpenRows {
  int64_t *row;
  double *threshold;  // a code that scores less cannot be the nearest
};

// One thread a row: joins the parts of the codebook, then writes the index or leaves the row open.
static __global__ void nearest_certify(int64_t N, int64_t D, int64_t splits, Leaders leaders, SearchState *state,
                                OpenRows open, int64_t *indices) {
  const float largest_norm = __int_as_float(state->largest_norm);
  for (int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; n < N; n += (int64_t)gridDim.x * blockDim.x) {
    float best = kNever, second = kNever;
    int code = 0;
    for (int64_t s = 0; s < splits; ++s) {
      challenge(leaders.best[s * N + n], leaders.code[s * N + n], best, second, code);
      second = fmaxf(second, leaders.second[s * N + n]);
    }
    const double bound = score_error_bound(D, leaders.squared_norm[n], largest_norm);
    // False as well where anything is NaN or infinite.
    if (is_finite(best) && (double)best - (double)second > 2 * bound) {
      indices[n] = code;
    } else {
      const unsigned long long at = atomicAdd(&state->open, 1ull);
      open.row[at] = n;
      open.threshold[at] = is_finite(best) && is_finite(bound) ? (double)best - 2 * bound : -INFINITY;
    }
  }
}

// The nearest code of a part of the codebook; code < 0: none at a finite distance.
struct Nearest {
  double high, low;  // distance
  int code;
};

__device__ __forceinline__ bool nearer(const Nearest &a, const Nearest &b) {
  if (a.code < 0 || b.code < 0) return b.code < 0 && a.code >= 0;
  const Double2 at_a = {a.high, a.low}, at_b = {b.high, b.low};
  return at_a < at_b || (!(at_b < at_a) && a.code < b.code);
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
__global__ void __launch_bounds__(kSearchThreads)
    nearest_exact(Rows<T> x, int64_t D, const T *codebook, int64_t K, CentredCodes codes, const SearchState *state,
                  OpenRows open, Nearest *nearest) {
  VQFAST_SHARED(float, row, [kSearchThreads]);
  VQFAST_SHARED(int, broken, [32]);
  VQFAST_SHARED(Nearest, warps, [32]);
  const int64_t rows = (int64_t)state->open;
  if (rows == 0) return;
  const int64_t code_blocks = (K + kSearchThreads - 1) / kSearchThreads;
  const int64_t parts = exact_parts(rows, gridDim.x, code_blocks);
  const int64_t blocks_per_part = (code_blocks + parts - 1) / parts;
  const int thread = threadIdx.x;

  for (int64_t item = blockIdx.x; item < rows * parts; item += gridDim.x) {
    const int64_t entry = item / parts, part = item % parts;
    const int64_t from = x.offset(open.row[entry]);
    const double threshold = open.threshold[entry];
    Nearest mine = {INFINITY, 0, -1};

    int not_finite = 0;
    for (int64_t d = thread; d < D; d += kSearchThreads) not_finite |= !is_finite(x.data[from + d * x.stride_feature]);
    not_finite = block_reduce(not_finite, Add(), broken);
    const int64_t end = (part + 1) * blocks_per_part < code_blocks ? (part + 1) * blocks_per_part : code_blocks;
    // A row that is not finite is at no finite distance from any code.
    for (int64_t block = part * blocks_per_part; block < end && !not_finite; ++block) {
      const int64_t k = block * kSearchThreads + thread;
      float dot = 0;
      for (int64_t d0 = 0; d0 < D; d0 += kSearchThreads) {
        __syncthreads();
        if (d0 + thread < D)
          row[thread] = centred(x.data[from + (d0 + thread) * x.stride_feature], codes.centre[d0 + thread]);
        __syncthreads();
        const int count = D - d0 < kSearchThreads ? (int)(D - d0) : kSearchThreads;
        if (k < K)
          for (int i = 0; i < count; ++i) dot = fmaf(row[i], codes.codes[(d0 + i) * codes.pitch + k], dot);
      }
      // A score that is NaN is no reason to leave a code out.
      if (k >= K || (double)(dot + codes.bias[k]) < threshold) continue;
      Double2 distance = {0, 0};
      for (int64_t d = 0; d < D; ++d)
        distance = add_squared_difference(distance, (double)widen(x.data[from + d * x.stride_feature]),
                                          (double)widen(codebook[k * D + d]));
      const Nearest candidate = {distance.high, distance.low, (int)k};
      if (is_finite(distance.high) && nearer(candidate, mine)) mine = candidate;
    }

#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
      const Nearest other = {__shfl_xor_sync(kFullWarp, mine.high, step), __shfl_xor_sync(kFullWarp, mine.low, step),
                             __shfl_xor_sync(kFullWarp, mine.code, step)};
      if (nearer(other, mine)) mine = other;
    }
    if (thread % 32 == 0) warps[thread / 32] = mine;
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < kSearchThreads / 32; ++w)
        if (nearer(warps[w], mine)) mine = warps[w];
      nearest[item] = mine;
    }
    // The next item writes `row` and `warps` only after the barriers of its block_reduce.
  }
}

// One thread an open row: joins its parts. A row at no finite distance from any code gets code 0.
static __global__ void nearest_decide(int64_t K, int64_t exact_blocks, const SearchState *state, OpenRows open,
                               const Nearest *nearest, int64_t *indices, int64_t *reranked) {
  const int64_t rows = (int64_t)state->open;
  if (reranked != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *reranked = rows;
  if (rows == 0) return;
  const int64_t parts = exact_parts(rows, exact_blocks, (K + kSearchThreads - 1) / kSearchThreads);
  for (int64_t entry = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; entry < rows;
       entry += (int64_t)gridDim.x * blockDim.x) {
    Nearest winner = nearest[entry * parts];
    for (int64_t p = 1; p < parts; ++p)
      if (nearer(nearest[entry * parts + p], winner)) winner = nearest[entry * parts + p];
    indices[open.row[entry]] = winner.code < 0 ? 0 : winner.code;
  }
}

}  // namespace vqfast
