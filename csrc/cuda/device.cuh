// What all kernels share: element types, strided rows, sums over a warp and a block.
//
// A .cuh file is read by nvcc, and by the host compiler in the tests, where cuda_shim.h stands in for the device. So
// kernels say VQFAST_SHARED and VQFAST_DYNAMIC_SHARED, and inline assembly hides in one function each.
#pragma once

#include <stdint.h>

#include "vqfast.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define VQFAST_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define VQFAST_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace vqfast {

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}

__device__ __forceinline__ uint16_t float_to_half(float v) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

__device__ __forceinline__ uint16_t float_to_bfloat16(float v) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

}  // namespace vqfast
#else
#include "cuda_shim.h"
#endif

namespace vqfast {

constexpr unsigned kFullWarp = 0xffffffffu;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type that sums and outputs of an element type have.
template <typename T>
struct Accumulate {
  typedef float type;
};
template <>
struct Accumulate<double> {
  typedef double type;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return __uint_as_float((uint32_t)v.bits << 16); }
__device__ __forceinline__ float widen(f16 v) { return half_to_float(v.bits); }

__device__ __forceinline__ void narrow(float v, float &out) { out = v; }
__device__ __forceinline__ void narrow(double v, double &out) { out = v; }
__device__ __forceinline__ void narrow(float v, bf16 &out) { out.bits = float_to_bfloat16(v); }
__device__ __forceinline__ void narrow(float v, f16 &out) { out.bits = float_to_half(v); }

// V elements that are read and written at once: 16 bytes, or one element.
template <typename T>
constexpr int kVector = 16 / (int)sizeof(T);

template <typename T, int V>
__device__ __forceinline__ void load(const T *from, accumulate_t<T> (&values)[V]) {
  T elements[V];
  if constexpr (V == 1) {
    elements[0] = *from;
  } else {
    static_assert(V * sizeof(T) == sizeof(uint4), "a vector is 16 bytes");
    const uint4 raw = *reinterpret_cast<const uint4 *>(from);
    __builtin_memcpy(elements, &raw, sizeof raw);
  }
#pragma unroll
  for (int j = 0; j < V; ++j) values[j] = widen(elements[j]);
}

template <typename T, int V>
__device__ __forceinline__ void store(T *to, const accumulate_t<T> (&values)[V]) {
  T elements[V];
#pragma unroll
  for (int j = 0; j < V; ++j) narrow(values[j], elements[j]);
  if constexpr (V == 1) {
    *to = elements[0];
  } else {
    uint4 raw;
    __builtin_memcpy(&raw, elements, sizeof raw);
    __stwb(reinterpret_cast<uint4 *>(to), raw);  // a plain assignment may become four stores
  }
}

// A (batch, rows, D) view of vectors, read in place. Strides in elements.
template <typename T>
struct Rows {
  const T *data;
  int64_t rows, stride_batch, stride_row, stride_feature;

  __host__ __device__ Rows(const vqfast_rows &view)
      : data(static_cast<const T *>(view.data)),
        rows(view.batch == 1 ? 0 : view.rows),  // 0: one batch, and no division
        stride_batch(view.stride_batch),
        stride_row(view.stride_row),
        stride_feature(view.stride_feature) {}

  __device__ __forceinline__ int64_t offset(int64_t n) const {
    return rows == 0 ? n * stride_row : n / rows * stride_batch + n % rows * stride_row;
  }
};

template <typename R>
__device__ __forceinline__ R warp_sum(R v) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) v += __shfl_xor_sync(kFullWarp, v, step);
  return v;
}

struct Add {
  template <typename R>
  __device__ __forceinline__ R operator()(R a, R b) const {
    return a + b;
  }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ double operator()(double a, double b) const { return fmax(a, b); }
};

// Combines one value of every thread; all of them get the same bits, so that all may branch on the result.
// `partial` holds 32 values. Every thread of the block must call it.
template <typename R, typename Combine>
__device__ __forceinline__ R block_reduce(R v, Combine combine, R *partial) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) v = combine(v, __shfl_xor_sync(kFullWarp, v, step));
  __syncthreads();  // `partial` may still be read from the call before
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  v = partial[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) v = combine(v, partial[w]);
  return v;
}

}  // namespace vqfast
