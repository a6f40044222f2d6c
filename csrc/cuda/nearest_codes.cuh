// What the scores of a search compare: the codebook centred, scaled and transposed, and the powers of two that keep
// both sides in float32's range. kernels/nearest/README.md has the method; lines that round are marked with the name of
// their term in `score_error_bound` (nearest_scores.cuh).
//
// For distances u = s (x - m) and v_k = s (c_k - m), with a common centre m and a power of two s: the nearest code has
// the largest score s_k = u . v_k - 1/2 ||v_k||^2. For products v_k is the same but u = r x, for x . m is the same for
// every code, and the score is u . v_k; for cosines c_k / ||c_k|| stands for c_k. Products and cosines need the scale r
// of the rows, cosines the norms of the codes: a kernel each.
#pragma once

#include "device.cuh"
#include "launch.h"

namespace vqfast {

constexpr float kNever = -INFINITY;

// All zero at first.
struct SearchState {
  unsigned long long open;  // rows left open
  // Bits of floats, rounded up: floats from 0 up have the order of their bits.
  int largest_norm;  // >= every ||c^_k||
  int unit_error;    // >= what s c_k / ||c_k|| is off by, as a vector, before it becomes c^_k; 0 but for cosines
  // size_of values, 0 where there was none.
  int code_size, row_size;  // the largest of those sampled: of codes from their centre, of rows
  int largest_code;         // the largest of all codes that are finite; for products
};

// A size is a float64's exponent, which for subnormals is all the same, made positive; 0 for zero and what is not
// finite.
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

// What codes are scaled by where they are compared in float64: no sum of products may overflow, far as the codes may
// lie from the origin. Cosines have a scale for each code.
__device__ __forceinline__ double comparison_scale(vqfast_metric metric, const SearchState &state) {
  return scale_of<double>(metric == VQFAST_DOT ? state.largest_code : state.code_size);
}

// The codes as the scores read them.
struct CentredCodes {
  float *centre;      // (D), of the codes
  float *row_centre;  // (D), of the rows: the same for distances, else zero
  double *factors;    // (K): of the values of each code to unit length; for cosines
  float *codes;       // (padded D, padded K): zero beyond D and K and where a code is not finite
  float *bias;    // (padded K): -1/2 ||v_k||^2 for distances, else 0; kNever beyond K and where a code is not finite
  int64_t pitch;  // padded K

  __device__ __forceinline__ double factor(vqfast_metric metric, int64_t k) const {
    return metric == VQFAST_COSINE ? factors[k] : 1;
  }
};

// s (f c - m) of a value of a code. Rounds, for cosines: [units].
__device__ __forceinline__ double centred_code(double v, double factor, float centre, double scale) {
  return (v * factor - (double)centre) * scale;
}

__device__ __forceinline__ float rounded_up(double v) { return (float)(v * (1 + 0x1p-20)); }

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

// Mean of up to 256 codes at even distances, of unit length for cosines, and the size of their largest deviation from
// it. The values only tighten the bound: any centre and any power of two give a right result. A block of 32 x 8 threads
// for 32 features.
template <typename T>
__global__ void nearest_centre(vqfast_metric metric, const T *codebook, int64_t K, int64_t D, CentredCodes codes,
                               SearchState *state) {
  VQFAST_SHARED(double, sums, [8][32]);
  VQFAST_SHARED(int, counts, [8][32]);
  VQFAST_SHARED(float, means, [32]);
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t d = (int64_t)blockIdx.x * 32 + lane;
  const int64_t samples = d < D ? K < 256 ? K : 256 : 0;
  // Feature d of a sampled code; NaN where the code has no direction.
  const auto sample = [&](int64_t i) {
    const int64_t k = i * K / samples;
    const double factor = codes.factor(metric, k);
    return factor == 0 ? (double)NAN : (double)widen(codebook[k * D + d]) * factor;
  };
  double sum = 0;
  int count = 0;
  for (int64_t i = part; i < samples; i += 8) {
    const double v = sample(i);
    if (is_finite(v)) {
      sum += v;
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
    codes.centre[d] = means[lane] = is_finite(mean) ? mean : 0.0f;
    codes.row_centre[d] = metric == VQFAST_L2 ? means[lane] : 0.0f;
  }
  __syncthreads();
  int size = 0;
  for (int64_t i = part; i < samples; i += 8) size = max(size, size_of(sample(i) - (double)means[lane]));
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

// What the values of each code are multiplied by for unit length: 0 for a zero code and for one that is not finite. Off
// by less than (D + 8) 2^-53. A warp a code.
template <typename T>
__global__ void nearest_factors(const T *codebook, int64_t K, int64_t D, double *factors, SearchState *state) {
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
    if (lane != 0) continue;
    const double factor = square > 0 && is_finite(square) ? scale / sqrt(square) : 0;
    factors[k] = factor;
    // Beyond the normal numbers of float64 a factor may be off by more: then no row is certain.
    if (factor != 0 && !(factor >= 0x1p-1022 && factor < (double)INFINITY))
      atomicMax(&state->unit_error, __float_as_int(INFINITY));
  }
}

// Centres and transposes 32 codes a block, 32 features at a time.
template <typename T>
__global__ void nearest_codes(vqfast_metric metric, const T *codebook, int64_t K, int64_t D, int64_t padded_features,
                              CentredCodes out, SearchState *state) {
  VQFAST_SHARED(T, tile, [32][33]);
  VQFAST_SHARED(double, norms, [2][8][32]);
  VQFAST_SHARED(int, sizes, [8][32]);
  constexpr int kNotFinite = INT32_MAX;
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t first = (int64_t)blockIdx.x * 32, k = first + lane;
  const double scale = scale_of<T>(state->code_size), factor = k < K ? out.factor(metric, k) : 0;
  double norm = 0, exact_norm = 0;
  int size = 0;
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
          const double exact = centred_code(widen(v), factor, out.centre[d], scale);
          value = (float)exact;  // rounds: [centring]
          norm += (double)value * value;
          exact_norm += exact * exact;
          if (metric == VQFAST_DOT) size = max(size, size_of(widen(v)));
        } else {
          size = kNotFinite;
        }
      }
      out.codes[d * out.pitch + k] = value;
    }
    __syncthreads();
  }
  norms[0][part][lane] = norm;
  norms[1][part][lane] = exact_norm;
  sizes[part][lane] = size;
  __syncthreads();
  if (part != 0) return;
  for (int i = 1; i < 8; ++i) {
    norm += norms[0][i][lane];
    exact_norm += norms[1][i][lane];
    size = max(size, sizes[i][lane]);
  }
  const bool taken = k < K && size != kNotFinite;
  const float bias = metric == VQFAST_L2 ? (float)(-0.5 * exact_norm) : 0.0f;  // rounds: [bias]
  out.bias[k] = taken ? bias : kNever;
  if (metric == VQFAST_COSINE && k == 0)
    atomicMax(&state->unit_error, __float_as_int(rounded_up(scale * ((double)D + 8) * 0x1p-53)));  // [units]
  if (!taken) return;
  // Infinite where the code leaves float32's range: then no row is certain.
  atomicMax(&state->largest_norm, __float_as_int(rounded_up(sqrt(norm))));
  if (metric == VQFAST_DOT) atomicMax(&state->largest_code, size);
}

}  // namespace vqfast
