// One row of K scores spread over a block: thread i holds vectors i, i + blockDim.x, ... of V elements. Kept in shared
// memory between passes where it fits, where no thread reads another's part; else read again.
#pragma once

#include "device.cuh"

namespace vqfast {

template <typename T, int V>
class SoftmaxRow {
 public:
  typedef accumulate_t<T> R;

  // kept: shared memory as launch.h's softmax_plan sizes it, or null.
  __device__ SoftmaxRow(const T *scores, int K, R *kept) : scores_(scores), K_((unsigned)K), kept_(kept) {}

  __device__ R largest() {
    R largest = -INFINITY;
    visit([&](unsigned first, unsigned slot) {
      R values[V];
      load<T, V>(scores_ + first, values);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        largest = Max()(largest, values[j]);
        if (kept_) kept_[(slot + j) * blockDim.x + threadIdx.x] = values[j];
      }
    });
    return largest;
  }

  // Sum over this thread's part of exp((score - largest) * inverse_temperature). Call it once, after largest().
  __device__ R weigh(R largest, R inverse_temperature) {
    largest_ = largest;
    inverse_temperature_ = inverse_temperature;
    R sum = 0;
    visit([&](unsigned first, unsigned slot) {
      R values[V];
      if (!kept_) load<T, V>(scores_ + first, values);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const unsigned at = (slot + j) * blockDim.x + threadIdx.x;
        const R weight = weight_of(kept_ ? kept_[at] : values[j]);
        if (kept_) kept_[at] = weight;
        sum += weight;
      }
    });
    return sum;
  }

  __device__ __forceinline__ R weight_of(R score) const { return exp((score - largest_) * inverse_temperature_); }

  // body(first code, weights): this thread's vectors in order. After weigh().
  template <typename Body>
  __device__ __forceinline__ void for_each(Body body) const {
    visit([&](unsigned first, unsigned slot) {
      R weights[V];
      read(first, slot, weights);
      body(first, weights);
    });
  }

  // The stripes of blockDim.x vectors, for passes in which all threads meet.
  __device__ unsigned stripes() const { return (K_ + blockDim.x * V - 1) / (blockDim.x * V); }

  // This thread's vector of a stripe; false and zeros beyond K.
  __device__ __forceinline__ bool stripe(unsigned s, unsigned &first, R (&weights)[V]) const {
    first = (s * blockDim.x + threadIdx.x) * V;
    if (first >= K_) {
#pragma unroll
      for (int j = 0; j < V; ++j) weights[j] = 0;
      return false;
    }
    read(first, s * V, weights);
    return true;
  }

  // The thread whose vector holds code k.
  __device__ unsigned owner(int k) const { return (unsigned)k / V % blockDim.x; }

 private:
  template <typename Body>
  __device__ __forceinline__ void visit(Body body) const {
    unsigned slot = 0;
    for (unsigned first = threadIdx.x * V; first < K_; first += blockDim.x * V, slot += V) body(first, slot);
  }

  __device__ __forceinline__ void read(unsigned first, unsigned slot, R (&weights)[V]) const {
    if (kept_) {
#pragma unroll
      for (int j = 0; j < V; ++j) weights[j] = kept_[(slot + j) * blockDim.x + threadIdx.x];
      return;
    }
    load<T, V>(scores_ + first, weights);
#pragma unroll
    for (int j = 0; j < V; ++j) weights[j] = weight_of(weights[j]);
  }

  const T *scores_;
  unsigned K_;
  R *kept_;
  R largest_ = 0, inverse_temperature_ = 1;
};

// An index that is out of range is brought into it: a kernel cannot raise.
__device__ __forceinline__ int64_t clamp_index(int64_t i, int64_t size) { return i < 0 ? 0 : min(i, size - 1); }

}  // namespace vqfast
