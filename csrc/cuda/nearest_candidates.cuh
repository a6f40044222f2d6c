// What scores by tensor cores read and leave, whichever instructions multiply: vectors packed to bfloat16, and of every
// row the few codes that can be its nearest one. Nothing of a row is scored twice: which of those codes it is, is
// decided in float64 (nearest_choose.cuh).
#pragma once

#include "hopper.cuh"
#include "nearest_codes.cuh"

namespace vqfast {

// Vectors as the products read them: bfloat16, zero beyond D. Vector by vector, (n, pitch); or panel by panel, (panels,
// count, bytes of a panel), the 16-byte chunks of neighbouring vectors permuted as products by warpgroups want them
// (hopper.cuh). Then as many vectors of a panel as one likes are one piece of memory, which is copied as it is.
struct PackedVectors {
  bf16 *values;
  int pitch;       // features, a multiple of 16
  int panel;       // log2 of the bytes that a vector has in a panel; 0: vector by vector
  int64_t count;   // vectors that there is room for
  bool with_bias;  // the bias of a code is its three features after D, where rows have ones; else the sums get it

  __device__ __forceinline__ bf16 &at(int64_t i, int d) const {
    if (panel == 0) return values[i * pitch + d];
    const int row_bytes = 1 << panel, byte = 2 * d;
    return values[swizzled((((byte >> panel) * count + i) << panel) + (byte & (row_bytes - 1)), row_bytes) / 2];
  }
};

// Floats as integers of the same order.
__device__ __forceinline__ int ordered(float v) {
  const int bits = __float_as_int(v);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(int v) { return __int_as_float(v ^ (v >> 31 & 0x7fffffff)); }

// The least score within reach of the best one; rounded down.
__device__ __forceinline__ float least_within(float best, float reach) {
  const float least = best - reach;
  return least - fabsf(least) * 0x1p-22f - 0x1p-126f;
}

struct Candidate {
  int code;
  float score;
};

// What the scores leave of each row, per part of the codebook: (splits, n) and (splits, n, kKept).
struct KeptCandidates {
  float *best;
  int *count;  // above kKept: too many
  Candidate *candidates;
};

// The candidates of a row while its scores come in, in shared memory: those within reach of the best score so far.
template <int kRoom>
struct ListedCandidates {
  Candidate items[kRoom];
  int count;  // above kRoom: one was lost

  // By any number of threads at once.
  __device__ __forceinline__ void add(int code, float score) {
    const int at = atomicAdd(&count, 1);
    if (at < kRoom) items[at] = {code, score};
  }
  // While nobody adds: leaves out what has lost since.
  __device__ __forceinline__ void drop_below(float least) {
    if (count > kRoom) {  // has lost one for good
      count = kRoom + 1;
      return;
    }
    int kept = 0;
    for (int i = 0; i < count; ++i)
      if (items[i].score >= least) items[kept++] = items[i];
    count = kept;
  }
  // What is left in the end, to entry `at`.
  __device__ __forceinline__ void keep(float best, float least, const KeptCandidates &out, int64_t at) const {
    int kept = 0;
    for (int i = 0; i < min(count, kRoom); ++i) {
      if (!(items[i].score >= least)) continue;
      if (kept < kKept) out.candidates[at * kKept + kept] = items[i];
      ++kept;
    }
    out.best[at] = best;
    out.count[at] = count > kRoom ? kKept + 1 : kept;
  }
};

}  // namespace vqfast
