// Exact nearest-code search: float32 scores, a bound on their error, exact distances where the bound does not decide.
//
// For distances u = s (x - m) and v_k = s (c_k - m), with a common centre m and a power of two s: the nearest code has
// the largest score s_k = u . v_k - 1/2 ||v_k||^2. For products u = r x and v_k = s c_k, for cosines v_k = c_k / ||c_k||,
// and the score is u . v_k. Six kernels: the centre and the scale; the codes, transposed; the scores, best and second of
// each row; certainty, from the error bound; the rows that stay open, exactly and in parts of the codebook; their
// winners. Products and cosines need the scale r of the rows, cosines the norms of the codes: a kernel each. Lines that
// round are marked with the name of their term in `score_error_bound`.
#pragma once

#include "device.cuh"
#include "exact_distance.h"
#include "launch.h"

namespace vqfast {

constexpr float kNever = -INFINITY;

// All zero at first.
struct SearchState {
  unsigned long long open;  // rows left open
  int largest_norm;         // bits of a float, >= every ||c^_k||: floats from 0 up have the order of their bits
  int code_size, row_size;  // size_of the largest value sampled; 0: there was none
};

// A size is a float64's exponent, which for subnormals is all the same, made positive; 0 for zero and what is not finite.
constexpr int kSizeBias = 1024;

__device__ __forceinline__ int size_of(double v) {
  v = fabs(v);
  return v > 0 && v < (double)INFINITY ? (int)(__double_as_longlong(v) >> 52) + 1 : 0;
}

// The type that a scale has in the scores.
template <typename T>
struct ScaleOf {
  typedef float type;
};
template <>
struct ScaleOf<double> {
  typedef double type;
};

// The power of two that brings values of this size to [1, 2), as far as the type of T's scale can hold it.
__device__ __forceinline__ float power_of_two(int exponent, float) {
  return __int_as_float((127 + max(-120, min(120, exponent))) << 23);
}
__device__ __forceinline__ double power_of_two(int exponent, double) {
  return __longlong_as_double((long long)(1023 + max(-1000, min(1000, exponent))) << 52);
}
template <typename T>
__device__ __forceinline__ typename ScaleOf<T>::type scale_of(int size) {
  return size == 0 ? 1 : power_of_two(kSizeBias - size, typename ScaleOf<T>::type());
}

// What rows are scaled by. Distances need one scale for rows and codes.
template <typename T>
__device__ __forceinline__ typename ScaleOf<T>::type row_scale(vqfast_metric metric, const SearchState &state) {
  return scale_of<T>(metric == VQFAST_L2 ? state.code_size : state.row_size);
}

// The codes as the scores read them.
struct CentredCodes {
  float *centre;    // (D), zero unless distances are searched
  double *factors;  // (K): of the values of each code to unit length; for cosines
  float *codes;   // (padded D, padded K): zero beyond D and K and where a code is not finite
  float *bias;    // (padded K): -1/2 ||v_k||^2 for distances, else 0; kNever beyond K and where a code is not finite
  int64_t pitch;  // padded K
};

template <typename T>
__device__ __forceinline__ bool is_finite(T v) {
  return widen(v) - widen(v) == 0;
}

// s (x - m) to float32. Rounds once: [centring]; the scale is a power of two.
__device__ __forceinline__ float centred(float v, float centre, float scale) { return (v - centre) * scale; }
__device__ __forceinline__ float centred(double v, float centre, double scale) {
  return (float)((v - (double)centre) * scale);
}
__device__ __forceinline__ float centred(bf16 v, float centre, float scale) { return (widen(v) - centre) * scale; }
__device__ __forceinline__ float centred(f16 v, float centre, float scale) { return (widen(v) - centre) * scale; }

// Mean of up to 256 codes at even distances, and the size of their largest deviation from it. The values only tighten the
// bound: any centre and any power of two give a right result. A block of 32 x 8 threads for 32 features.
template <typename T>
__global__ void nearest_centre(vqfast_metric metric, const T *codebook, int64_t K, int64_t D, float *centre,
                               SearchState *state) {
  VQFAST_SHARED(double, sums, [8][32]);
  VQFAST_SHARED(int, counts, [8][32]);
  VQFAST_SHARED(float, means, [32]);
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t d = (int64_t)blockIdx.x * 32 + lane;
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
  if (part == 0 && d < D) {
    for (int i = 1; i < 8; ++i) {
      sum += sums[i][lane];
      count += counts[i][lane];
    }
    const float mean = (float)(sum / (count > 0 ? count : 1));
    centre[d] = means[lane] = metric == VQFAST_L2 && is_finite(mean) ? mean : 0.0f;
  }
  __syncthreads();
  int size = 0;
  for (int64_t i = part; i < samples && d < D; i += 8)
    size = max(size, size_of((double)widen(codebook[i * K / samples * D + d]) - (double)means[lane]));
  if (size > 0) atomicMax(&state->code_size, size);
}

// The size of the largest value of up to 256 rows at even distances. One block.
template <typename T>
__global__ void nearest_row_size(Rows<T> x, int64_t N, int64_t D, SearchState *state) {
  const int64_t samples = N < 256 ? N : 256;
  int size = 0;
  for (int64_t i = threadIdx.x; i < samples * D; i += blockDim.x)
    size = max(size, size_of((double)widen(x.data[x.offset(i / D * N / samples) + i % D * x.stride_feature])));
  if (size > 0) atomicMax(&state->row_size, size);
}

// What the values of each code are multiplied by for unit length: 0 for a zero code and for one that is not finite. Off by
// less than (D + 8) 2^-53. A warp a code.
template <typename T>
__global__ void nearest_factors(const T *codebook, int64_t K, int64_t D, double *factors) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = (int64_t)gridDim.x * (blockDim.x / 32);
  for (int64_t k = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; k < K; k += warps) {
    double largest = 0, square = 0;
    for (int64_t d = lane; d < D; d += 32) largest = fmax(largest, fabs((double)widen(codebook[k * D + d])));
    for (int step = 16; step > 0; step >>= 1) largest = fmax(largest, __shfl_xor_sync(kFullWarp, largest, step));
    const double scale = scale_of<double>(size_of(largest));
    for (int64_t d = lane; d < D; d += 32) {
      const double v = (double)widen(codebook[k * D + d]) * scale;
      square += v * v;
    }
    for (int step = 16; step > 0; step >>= 1) square += __shfl_xor_sync(kFullWarp, square, step);
    if (lane == 0) factors[k] = square > 0 && is_finite(square) ? scale / sqrt(square) : 0;
  }
}

// Centres and transposes 32 codes a block, 32 features at a time.
template <typename T>
__global__ void nearest_codes(vqfast_metric metric, const T *codebook, int64_t K, int64_t D, int64_t padded_features,
                              CentredCodes out, SearchState *state) {
  VQFAST_SHARED(T, tile, [32][33]);
  VQFAST_SHARED(double, norms, [2][8][32]);
  VQFAST_SHARED(int, broken, [8][32]);
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t first = (int64_t)blockIdx.x * 32, k = first + lane;
  const double factor = metric != VQFAST_COSINE ? scale_of<T>(state->code_size) : k < K ? out.factors[k] : 0;
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
          const double exact = ((double)widen(v) - (double)out.centre[d]) * factor;
          value = (float)exact;  // rounds: [centring]
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
  const float bias = metric == VQFAST_L2 ? (float)(-0.5 * exact_norm) : 0.0f;  // rounds: [bias]
  out.bias[k] = taken ? bias : kNever;
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
                      codes.centre[d], *scale);
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

// The results of one head: a row's is at `step` times its number. mask, or null: 0 where a row does not count.
struct Found {
  int64_t *indices;
  const uint8_t *mask;
  int64_t step;
};

// One thread a row: joins the parts of the codebook, then writes the index or leaves the row open.
static __global__ void nearest_certify(int exact, int64_t N, int64_t D, int64_t splits, Leaders leaders,
                                       SearchState *state, OpenRows open, Found found) {
  const float largest_norm = __int_as_float(state->largest_norm);
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
    const double bound = score_error_bound(D, leaders.squared_norm[n], largest_norm);
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

// What code c is worth to a row, in twice float64. Scales keep float64 values from overflow: of the row, and of the code
// unless cosines are compared, which take one of their own.
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
  const double scale_c = scale_of<double>(state->code_size), slack = slack_of(metric);

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
          row[thread] = centred(x.data[from + (d0 + thread) * x.stride_feature], codes.centre[d0 + thread], scale);
        __syncthreads();
        const int count = D - d0 < kSearchThreads ? (int)(D - d0) : kSearchThreads;
        if (k < K)
          for (int i = 0; i < count; ++i) dot = fmaf(row[i], codes.codes[(d0 + i) * codes.pitch + k], dot);
      }
      // A score that is NaN is no reason to leave a code out.
      if (k >= K || (double)(dot + codes.bias[k]) < threshold) continue;
      if (codes.bias[k] == kNever) continue;
      const Double2 worth =
          exact_worth(metric, x.data + from, x.stride_feature, codebook + k * D, D, scale_x, scale_c);
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
