// Host side of every launcher: the device made current, kernels started on the caller's stream, the first error kept.
#pragma once

#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "device.cuh"
#include "launch.h"

namespace vqfast {

// Lets a kernel be launched with so much dynamic shared memory on the current device. The limit is the kernel's, not
// the launch's: it is never lowered, for another thread may be about to launch with more.
template <typename... Parameters>
cudaError_t allow_shared_bytes(void (*kernel)(Parameters...), int device, int64_t bytes) {
  static std::mutex one_at_a_time;
  static std::map<std::pair<int, void (*)(Parameters...)>, int64_t> allowed;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  int64_t &most = allowed[{device, kernel}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (error == cudaSuccess) most = bytes;
  return error;
}

class Launcher {
 public:
  Launcher(int device, void *stream) : stream_(static_cast<cudaStream_t>(stream)), device_(device) {
    keep(cudaGetDevice(&previous_));
    if (ok() && previous_ != device) {
      keep(cudaSetDevice(device));
      restore_ = ok();
    }
    ask(cudaDevAttrMultiProcessorCount, device, limits_.multiprocessors);
    ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, limits_.shared_bytes);
    ask(cudaDevAttrMaxGridDimX, device, limits_.grid_x);
    int major = 0, minor = 0;
    ask(cudaDevAttrComputeCapabilityMajor, device, major);
    ask(cudaDevAttrComputeCapabilityMinor, device, minor);
    limits_.capability = 10 * major + minor;
  }
  ~Launcher() {
    if (restore_) cudaSetDevice(previous_);
  }
  Launcher(const Launcher &) = delete;
  Launcher &operator=(const Launcher &) = delete;

  const DeviceLimits &limits() const { return limits_; }
  bool ok() const { return error_ == cudaSuccess; }
  int code() const { return ok() ? (int)VQFAST_OK : VQFAST_CUDA_ERROR + (int)error_; }

  // Starts a kernel; does nothing after an error.
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), const LaunchPlan &plan, Arguments... arguments) {
    if (ok() && plan.shared_bytes > kPlainSharedBytes) keep(allow_shared_bytes(kernel, device_, plan.shared_bytes));
    if (!ok()) return;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(plan.grid_x, plan.grid_y);
    config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = (size_t)plan.shared_bytes;
    config.stream = stream_;
    keep(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  }

  void zero(void *data, int64_t bytes) {
    if (ok() && bytes > 0) keep(cudaMemsetAsync(data, 0, (size_t)bytes, stream_));
  }

 private:
  void ask(cudaDeviceAttr what, int device, int &value) {
    if (ok()) keep(cudaDeviceGetAttribute(&value, what, device));
  }
  void keep(cudaError_t error) {
    if (ok()) error_ = error;
  }

  cudaStream_t stream_;
  int device_;
  cudaError_t error_ = cudaSuccess;
  int previous_ = 0;
  bool restore_ = false;
  DeviceLimits limits_ = {};
};

// Cuts the caller's scratch memory into arrays. With a null base it only counts: size and layout come from one place.
class Scratch {
 public:
  explicit Scratch(void *base) : base_(static_cast<char *>(base)) {}

  template <typename T>
  T *take(int64_t n) {
    T *array = base_ ? reinterpret_cast<T *>(base_ + bytes_) : nullptr;
    bytes_ += ceil_div(n * (int64_t)sizeof(T), 256) * 256;
    return array;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char *base_;
  int64_t bytes_ = 0;
};

// Calls body(T *) with a null pointer of the element type; false for an unknown dtype.
template <typename Body>
bool with_element(vqfast_dtype dtype, Body body) {
  switch (dtype) {
    case VQFAST_F32:
      body((float *)nullptr);
      return true;
    case VQFAST_F64:
      body((double *)nullptr);
      return true;
    case VQFAST_BF16:
      body((bf16 *)nullptr);
      return true;
    case VQFAST_F16:
      body((f16 *)nullptr);
      return true;
  }
  return false;
}

inline bool aligned(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether every row of the view starts at a multiple of 16 bytes and is contiguous.
template <typename T>
bool vectors_of_16_bytes(const vqfast_rows &view, int64_t D) {
  return view.stride_feature == 1 && D % kVector<T> == 0 && view.stride_row % kVector<T> == 0 &&
         view.stride_batch % kVector<T> == 0 && aligned(view.data);
}

}  // namespace vqfast
