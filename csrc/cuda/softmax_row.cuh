// One row of K scores spread over a block: thread i holds vectors i, i + blockDim.x, ... of V elements. Kept in shared
// memory between passes where it fits, where no thread reads another's part; else read again.
#pragma once

#include "device.cuh"

namespace vqfast {

constexpr unsigned kNoCode = 0x7fffffff;

// Where scores come from: logits, or with guidance unconditional + guidance (logits - unconditional).
template <typename T>
struct ScoreSource {
  typedef accumulate_t<T> R;
  const T *logits, *unconditional;  // unconditional: or null
  R guidance;

  template <int V>
  __device__ __forceinline__ void read(int64_t first, R (&values)[V]) const {
    load<T, V>(logits + first, values);
    if (!unconditional) return;
    R other[V];
    load<T, V>(unconditional + first, other);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const R guided = other[j] + guidance * (values[j] - other[j]);
      // A code that either calls impossible stays so; infinities of one sign would make it NaN.
      values[j] = values[j] == -INFINITY || other[j] == -INFINITY ? (R)-INFINITY : guided;
    }
  }
  __device__ __forceinline__ R score(int64_t k) const {
    R one[1];
    read<1>(k, one);
    return one[0];
  }
};

struct AllCodes {
  template <typename R>
  __device__ __forceinline__ bool operator()(R, unsigned) const {
    return true;
  }
};

// All codes but two.
struct OtherCodes {
  unsigned first, second;

  template <typename R>
  __device__ __forceinline__ bool operator()(R, unsigned code) const {
    return code != first && code != second;
  }
};

// Weighs: says of a score and its code whether it has a weight at all.
template <typename T, int V, typename Weighs>
class SoftmaxRow {
 public:
  typedef accumulate_t<T> R;
  static constexpr int kVectorSize = V;

  // kept: shared memory as launch.h's softmax_plan sizes it, or null.
  __device__ SoftmaxRow(const ScoreSource<T> &source, int K, R *kept) : source_(source), K_((unsigned)K), kept_(kept) {}

  // Of this thread's part, of the codes that `among` names.
  template <typename Among = AllCodes>
  __device__ R largest(const Among &among = {}) {
    R largest = -INFINITY;
    visit([&](unsigned first, unsigned slot) {
      R values[V];
      source_.template read<V>(first, values);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (among(values[j], first + j)) largest = Max()(largest, values[j]);
        if (kept_) kept_[(slot + j) * blockDim.x + threadIdx.x] = values[j];
      }
    });
    return largest;
  }

  // body(first code, scores): this thread's vectors in order. After largest(), before weigh().
  template <typename Body>
  __device__ __forceinline__ void for_each_scores(Body body) const {
    visit([&](unsigned first, unsigned slot) {
      R scores[V];
      read(first, slot, scores);
      body(first, scores);
    });
  }

  // body(code, score): the same, code by code.
  template <typename Body>
  __device__ __forceinline__ void for_each_score(Body body) const {
    for_each_scores([&](unsigned first, const R(&scores)[V]) {
#pragma unroll
      for (int j = 0; j < V; ++j) body(first + j, scores[j]);
    });
  }

  // From here on scores are exp((score - largest) * inverse_temperature). After largest().
  __device__ void scale(R largest, R inverse_temperature) {
    largest_ = largest;
    inverse_temperature_ = inverse_temperature;
  }

  // Sum over this thread's part of the weights that `weighs` lets have one. Call it once, after scale().
  __device__ R weigh(const Weighs &weighs) {
    weighs_ = weighs;
    R sum = 0;
    visit([&](unsigned first, unsigned slot) {
      R values[V];
      read(first, slot, values);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const R weight = weighs_(values[j], first + j) ? weight_of(values[j]) : 0;
        if (kept_) kept_[(slot + j) * blockDim.x + threadIdx.x] = weight;
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
      read_weights(first, slot, weights);
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
    read_weights(first, s * V, weights);
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

  // What is kept, scores or by now weights; where nothing is, scores.
  __device__ __forceinline__ void read(unsigned first, unsigned slot, R (&values)[V]) const {
    if (!kept_) {
      source_.template read<V>(first, values);
      return;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = kept_[(slot + j) * blockDim.x + threadIdx.x];
  }

  __device__ __forceinline__ void read_weights(unsigned first, unsigned slot, R (&weights)[V]) const {
    read(first, slot, weights);
    if (kept_) return;
#pragma unroll
    for (int j = 0; j < V; ++j) weights[j] = weighs_(weights[j], first + j) ? weight_of(weights[j]) : 0;
  }

  ScoreSource<T> source_;
  unsigned K_;
  R *kept_;
  R largest_ = 0, inverse_temperature_ = 1;
  Weighs weighs_ = {};
};

// A row of one value, each code written by its owner.
template <typename T, int V>
__device__ void fill_row(T *row, int K, accumulate_t<T> value) {
  accumulate_t<T> values[V];
#pragma unroll
  for (int j = 0; j < V; ++j) values[j] = value;
  for (unsigned k = threadIdx.x * V; k < (unsigned)K; k += blockDim.x * V) store<T, V>(row + k, values);
}

// An index that is out of range is brought into it: a kernel cannot raise.
__device__ __forceinline__ int64_t clamp_index(int64_t i, int64_t size) { return i < 0 ? 0 : min(i, size - 1); }

// How many states a chain over K codes has: with a mask, one more.
__device__ __forceinline__ int64_t states(const vqfast_levels &chain, int64_t K) { return K + (chain.columns == 2); }

}  // namespace vqfast
