// Where vectors whose features lie apart are gathered to (gather_rows.h).
#pragma once

#include <stdint.h>

#include "cache.h"
#include "dispatch.h"

namespace vqfast {

// Elements from a gathered vector to the next: a cache line more than it has, or vectors of a power of two would share
// a few sets of the cache.
constexpr int64_t gathered_pitch(int64_t D, int64_t size) { return D + kCacheLine / size; }

// Moves vectors[0..n-1], n <= kMostTogether, to `to`, and points them there. size: bytes of an element. to: n *
// gathered_pitch elements.
inline void gather(int64_t size, const void **vectors, int64_t n, int64_t D, int64_t stride_feature, void *to) {
  kernels().gather(size, vectors, n, D, stride_feature, to, gathered_pitch(D, size));
}

}  // namespace vqfast
