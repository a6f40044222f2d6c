// Codes by index, with the squared error of the choice and the count of each code; and the gradient to the input.
//
// Two ways through memory. Where every vector starts at a multiple of 16 bytes, a warp takes a row and reads 16 bytes a
// lane. Else a block takes 32 rows and 32 features at a time through shared memory, so that channel-first input is read
// along its rows while contiguous output is written along features.
#pragma once

#include "device.cuh"
#include "launch.h"

namespace vqfast {

// -1 where masked. An index that is out of range is brought into it: a kernel cannot raise.
__device__ __forceinline__ int64_t code_of(int64_t index, int64_t K) { return index < 0 ? -1 : min(index, K - 1); }

template <typename R>
__device__ __forceinline__ void finish_lookup(R squared_error, int64_t n, int64_t code, R *error, int64_t *counts) {
  squared_error = warp_sum(squared_error);
  if (threadIdx.x % 32 != 0) return;
  error[n] = squared_error;
  if (code >= 0) atomicAdd(reinterpret_cast<unsigned long long *>(counts + code), 1ull);
}

template <typename T>
__global__ void __launch_bounds__(kLookupThreads, 4)
    lookup_rows(Rows<T> x, int64_t N, int64_t D, const T *codebook, int64_t K, const int64_t *indices, T *quantized,
                accumulate_t<T> *error, int64_t *counts) {
  typedef accumulate_t<T> R;
  constexpr int V = kVector<T>;
  const int lane = threadIdx.x % 32;
  for (int64_t n = (int64_t)blockIdx.x * kLookupWarps + threadIdx.x / 32; n < N;
       n += (int64_t)gridDim.x * kLookupWarps) {
    const int64_t code = code_of(indices[n], K);
    const T *row = x.data + x.offset(n), *chosen = codebook + max(code, (int64_t)0) * D;
    R squared_error = 0;
    for (int64_t d = lane * V; d < D; d += 32 * V) {
      R value[V], q[V] = {};
      load<T, V>(row + d, value);
      if (code >= 0) {
        load<T, V>(chosen + d, q);
#pragma unroll
        for (int j = 0; j < V; ++j) squared_error += (value[j] - q[j]) * (value[j] - q[j]);
      }
      store<T, V>(quantized + n * D + d, q);
    }
    finish_lookup(squared_error, n, code, error, counts);
  }
}

template <typename T>
__global__ void __launch_bounds__(kLookupThreads, 4)
    lookup_backward_rows(Rows<T> grad_quantized, const accumulate_t<T> *grad_error, Rows<T> x, int64_t N, int64_t D,
                         const T *codebook, int64_t K, const int64_t *indices, T *grad_x) {
  typedef accumulate_t<T> R;
  constexpr int V = kVector<T>;
  const int lane = threadIdx.x % 32;
  for (int64_t n = (int64_t)blockIdx.x * kLookupWarps + threadIdx.x / 32; n < N;
       n += (int64_t)gridDim.x * kLookupWarps) {
    const int64_t code = code_of(indices[n], K);
    const T *row = x.data + x.offset(n), *chosen = codebook + max(code, (int64_t)0) * D;
    const T *through = grad_quantized.data + grad_quantized.offset(n);
    const R slope = 2 * grad_error[n];
    for (int64_t d = lane * V; d < D; d += 32 * V) {
      R value[V], q[V], grad[V] = {};
      if (code >= 0) {
        load<T, V>(row + d, value);
        load<T, V>(chosen + d, q);
        load<T, V>(through + d, grad);
#pragma unroll
        for (int j = 0; j < V; ++j) grad[j] += slope * (value[j] - q[j]);
      }
      store<T, V>(grad_x + n * D + d, grad);
    }
  }
}

// 32 rows by 32 features of a view, read in the order of its memory. One column more keeps both orders off each other's
// banks.
template <typename T>
__device__ __forceinline__ void stage(const Rows<T> &view, const int64_t (&offsets)[32], int64_t first_row, int64_t N,
                                      int64_t first_feature, int64_t D, T (&tile)[32][33]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = warp; i < 32; i += kLookupWarps) {
    const int row = view.stride_feature == 1 ? i : lane, feature = view.stride_feature == 1 ? lane : i;
    if (first_row + row < N && first_feature + feature < D)
      tile[row][feature] = view.data[offsets[row] + (first_feature + feature) * view.stride_feature];
  }
}

template <typename T>
__global__ void __launch_bounds__(kLookupThreads, 4)
    lookup_tiles(Rows<T> x, int64_t N, int64_t D, const T *codebook, int64_t K, const int64_t *indices, T *quantized,
                 accumulate_t<T> *error, int64_t *counts) {
  typedef accumulate_t<T> R;
  constexpr int kRowsPerWarp = 32 / kLookupWarps;
  VQFAST_SHARED(T, tile, [32][33]);
  VQFAST_SHARED(int64_t, offsets, [32]);
  VQFAST_SHARED(int64_t, codes, [32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t first = (int64_t)blockIdx.x * 32; first < N; first += (int64_t)gridDim.x * 32) {
    __syncthreads();  // the previous tile may still be read
    if (threadIdx.x < 32) {
      const int64_t n = min(first + lane, N - 1);
      offsets[lane] = x.offset(n);
      codes[lane] = code_of(indices[n], K);
    }
    R squared_error[kRowsPerWarp] = {};
    for (int64_t d0 = 0; d0 < D; d0 += 32) {
      __syncthreads();
      stage(x, offsets, first, N, d0, D, tile);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRowsPerWarp; ++i) {
        const int row = i * kLookupWarps + warp;
        const int64_t n = first + row, d = d0 + lane, code = codes[row];
        if (n >= N || d >= D) continue;
        T chosen = {};
        if (code >= 0) {
          chosen = codebook[code * D + d];
          const R difference = widen(tile[row][lane]) - widen(chosen);
          squared_error[i] += difference * difference;
        }
        quantized[n * D + d] = chosen;
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
      const int row = i * kLookupWarps + warp;
      if (first + row < N) finish_lookup(squared_error[i], first + row, codes[row], error, counts);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kLookupThreads, 4)
    lookup_backward_tiles(Rows<T> grad_quantized, const accumulate_t<T> *grad_error, Rows<T> x, int64_t N, int64_t D,
                          const T *codebook, int64_t K, const int64_t *indices, T *grad_x) {
  typedef accumulate_t<T> R;
  VQFAST_SHARED(T, x_tile, [32][33]);
  VQFAST_SHARED(T, grad_tile, [32][33]);
  VQFAST_SHARED(int64_t, x_offsets, [32]);
  VQFAST_SHARED(int64_t, grad_offsets, [32]);
  VQFAST_SHARED(int64_t, codes, [32]);
  VQFAST_SHARED(R, slopes, [32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t first = (int64_t)blockIdx.x * 32; first < N; first += (int64_t)gridDim.x * 32) {
    __syncthreads();  // the previous tile may still be read
    if (threadIdx.x < 32) {
      const int64_t n = min(first + lane, N - 1);
      x_offsets[lane] = x.offset(n);
      grad_offsets[lane] = grad_quantized.offset(n);
      codes[lane] = code_of(indices[n], K);
      slopes[lane] = 2 * grad_error[n];
    }
    for (int64_t d0 = 0; d0 < D; d0 += 32) {
      __syncthreads();
      stage(x, x_offsets, first, N, d0, D, x_tile);
      stage(grad_quantized, grad_offsets, first, N, d0, D, grad_tile);
      __syncthreads();
      for (int row = warp; row < 32; row += kLookupWarps) {
        const int64_t n = first + row, d = d0 + lane, code = codes[row];
        if (n >= N || d >= D) continue;
        T grad = {};
        if (code >= 0)
          narrow(widen(grad_tile[row][lane]) + slopes[row] * (widen(x_tile[row][lane]) - widen(codebook[code * D + d])),
                 grad);
        grad_x[n * D + d] = grad;
      }
    }
  }
}

}  // namespace vqfast
