// A CUDA device of one host thread: enough of the language and of the runtime for csrc/cuda to compile and run under a
// host compiler, with its sanitizers.
//
// Each CUDA thread is a fiber; it gives way at barriers, at warp operations and when it ends. Blocks run one after the
// other. Shared memory is allocated per block, exactly as large as declared and filled with NaN bits, so that a
// sanitizer sees an overrun and a wrong result shows a read of what nobody wrote. The order of fibers and blocks can be
// changed: a result that depends on it has a race. Under ThreadSanitizer each fiber counts as a thread and each block
// as unordered with the others, so that a missing barrier is reported with both accesses; a shuffle orders nothing,
// __syncwarp orders a warp, __syncthreads a block, the end of a kernel everything.
//
// Stricter than a device: every thread must reach every barrier, at the same line, and every lane each warp operation.
// Not modelled: simultaneous access, weak memory ordering of atomics, the speed of anything.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define VQFAST_SHARED(type, name, ...) \
  auto &name = *static_cast<type(*) __VA_ARGS__>(shim::shared_memory(__FILE__, __LINE__, sizeof(type __VA_ARGS__)))
#define VQFAST_DYNAMIC_SHARED(name) unsigned char *name = shim::dynamic_shared_memory()

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- the scheduler, cuda_shim.cpp ----------------------------------------------------------------------------------

namespace shim {

struct Settings {
  int multiprocessors = 2;
  int shared_bytes = 227 << 10;
  int grid_x = 0x7fffffff;
  int capability = 90;
  // Threads and blocks in their order (0), backwards (1), or shuffled with this seed.
  unsigned order = 0;
};
extern Settings settings;

void *shared_memory(const char *file, int line, size_t bytes);
unsigned char *dynamic_shared_memory();
size_t dynamic_shared_bytes();
void barrier(const char *file, int line);
bool barrier_or(const char *file, int line, bool own);
// Gives the 8 bytes of each lane of the calling thread's warp, once all of them have called.
const uint64_t *exchange(uint64_t own);
void warp_barrier();
unsigned lane();
// Until passed(about): the calling thread gives way meanwhile. If it never does, the block fails with what `describe`
// says.
void wait_until(const std::function<bool()> &passed, const std::function<void(char *, size_t)> &describe);
// What goes on beside the threads: called when a block begins, and after each turn of all threads that can move.
// `idle`: none could. True if something happened.
extern void (*block_begins)();
extern bool (*background)(bool idle);

int launch(dim3 grid, dim3 block, size_t shared_bytes, const void *kernel, const std::function<void()> &body);
void allow_shared_bytes(const void *kernel, int bytes);
[[noreturn]] void fail(const char *what, ...);

template <typename T>
T shuffle(unsigned mask, T own, unsigned from) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  if (mask != 0xffffffffu) fail("a warp operation for part of a warp");
  uint64_t bits = 0;
  memcpy(&bits, &own, sizeof own);
  const uint64_t *all = exchange(bits);
  memcpy(&own, &all[from < 32 ? from : lane()], sizeof own);
  return own;
}

}  // namespace shim

// ---- the language --------------------------------------------------------------------------------------------------

#define __syncthreads() shim::barrier(__FILE__, __LINE__)
#define __syncthreads_or(own) shim::barrier_or(__FILE__, __LINE__, (own) != 0)

inline void __syncwarp() { shim::warp_barrier(); }
template <typename T>
T __shfl_sync(unsigned mask, T v, int from) {
  return shim::shuffle(mask, v, (unsigned)from);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int step) {
  return shim::shuffle(mask, v, shim::lane() ^ (unsigned)step);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, int step) {
  return shim::shuffle(mask, v, shim::lane() < (unsigned)step ? shim::lane() : shim::lane() - (unsigned)step);
}
inline unsigned __match_any_sync(unsigned mask, int v) {
  if (mask != 0xffffffffu) shim::fail("a warp operation for part of a warp");
  const uint64_t *all = shim::exchange((uint32_t)v);
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) same |= (unsigned)(all[i] == (uint32_t)v) << i;
  return same;
}

inline int __any_sync(unsigned mask, int v) {
  if (mask != 0xffffffffu) shim::fail("a warp operation for part of a warp");
  const uint64_t *all = shim::exchange(v != 0);
  for (int i = 0; i < 32; ++i)
    if (all[i]) return 1;
  return 0;
}

// Atomic for ThreadSanitizer's sake.
template <typename T>
T atomicAdd(T *at, T v) {
  return __atomic_fetch_add(at, v, __ATOMIC_RELAXED);
}
template <typename T>
T atomicMax(T *at, T v) {
  T old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < v && !__atomic_compare_exchange_n(at, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
  return old;
}
inline int atomicMin(int *at, int v) {
  int old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old > v && !__atomic_compare_exchange_n(at, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
  return old;
}

template <typename To, typename From>
To shim_bits(From v) {
  To to;
  static_assert(sizeof to == sizeof v, "");
  memcpy(&to, &v, sizeof to);
  return to;
}
inline float __uint_as_float(uint32_t v) { return shim_bits<float>(v); }
inline float __int_as_float(int v) { return shim_bits<float>(v); }
inline int __float_as_int(float v) { return shim_bits<int>(v); }
inline double __longlong_as_double(long long v) { return shim_bits<double>(v); }
inline long long __double_as_longlong(double v) { return shim_bits<long long>(v); }
// As the device has it: beyond 2^126 the reciprocal is flushed to 0.
inline float __fdividef(float a, float b) { return fabsf(b) > 0x1p126f && !isinf(b) ? a * 0 : a / b; }
inline void __stwb(uint4 *at, uint4 v) { *at = v; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

namespace vqfast {

// Twins of the conversions that device.cuh writes in assembly: to nearest, ties to even.
inline float half_to_float(uint16_t bits) {
  const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) return shim_bits<float>(sign | shim_bits<uint32_t>((float)fraction * 0x1p-24f));
  if (exponent == 31) return shim_bits<float>(sign | 0x7f800000u | fraction << 13);
  return shim_bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
}
inline uint16_t float_to_half(float v) {
  const uint16_t sign = (uint16_t)(shim_bits<uint32_t>(v) >> 16 & 0x8000);
  const float size = fabsf(v);
  if (!(size == size)) return 0x7fff;
  if (size >= 65520) return sign | 0x7c00;
  int exponent;
  frexpf(size, &exponent);
  // The spacing of half floats at this size; adding 1.5 * 2^23 of them rounds to a multiple.
  const float spacing = ldexpf(1, exponent < -13 ? -24 : exponent - 11);
  const float rounded = (float)nearbyint((double)size / spacing) * spacing;
  if (rounded < 0x1p-14f) return sign | (uint16_t)(rounded * 0x1p24f);
  const uint32_t bits = shim_bits<uint32_t>(rounded);
  return sign | (uint16_t)(((bits >> 23) - 112) << 10 | (bits >> 13 & 1023));
}
inline uint16_t float_to_bfloat16(float v) {
  if (!(v == v)) return 0x7fff;
  const uint32_t bits = shim_bits<uint32_t>(v);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace vqfast

// ---- the runtime ---------------------------------------------------------------------------------------------------

typedef struct ShimStream *cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxGridDimX,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

// Two devices, so that a launcher that forgets to go back shows.
extern int shim_current_device;
inline cudaError_t cudaGetDevice(int *device) {
  *device = shim_current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  shim_current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount      ? shim::settings.multiprocessors
           : what == cudaDevAttrMaxGridDimX            ? shim::settings.grid_x
           : what == cudaDevAttrComputeCapabilityMajor ? shim::settings.capability / 10
           : what == cudaDevAttrComputeCapabilityMinor ? shim::settings.capability % 10
                                                       : shim::settings.shared_bytes;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *data, int value, size_t bytes, cudaStream_t) {
  memset(data, value, bytes);
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int value) {
  if (value > shim::settings.shared_bytes) return cudaErrorInvalidValue;
  shim::allow_shared_bytes((const void *)kernel, value);
  return cudaSuccess;
}
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
template <typename... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...), P... arguments) {
  return (cudaError_t)shim::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, (const void *)kernel,
                                   [=] { kernel(arguments...); });
}

#include "hopper_shim.h"
