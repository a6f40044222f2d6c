// Vectors whose features lie apart, copied to where they lie side by side.
#pragma once

#include <stdint.h>

#include "buffer.h"

namespace vqfast {

// Elements from a gathered vector to the next: a cache line more than it has, or vectors of a power of two would share a
// few sets of the cache.
constexpr int64_t gathered_pitch(int64_t D, int64_t size) { return D + kCacheLine / size; }

// Moves vectors[0..n-1] to `to` and points them there. Feature by feature: vectors that are neighbours have theirs in one
// cache line, which the next feature may put out of the cache.
template <class Bits>
void gather_as(const void **vectors, int64_t n, int64_t D, int64_t stride_feature, Bits *to) {
  const int64_t pitch = gathered_pitch(D, sizeof(Bits));
  constexpr int64_t kAhead = 16, kLine = kCacheLine / sizeof(Bits);
  for (int64_t d = 0; d < D; ++d) {
    // A stride of a page or more is not foreseen by the hardware.
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch((const Bits *)vectors[i] + (d + kAhead) * stride_feature);
    for (int64_t i = 0; i < n; ++i) to[i * pitch + d] = ((const Bits *)vectors[i])[d * stride_feature];
  }
  for (int64_t i = 0; i < n; ++i) vectors[i] = to + i * pitch;
}

// size: bytes of an element. to: n * gathered_pitch elements.
inline void gather(int64_t size, const void **vectors, int64_t n, int64_t D, int64_t stride_feature, void *to) {
  if (size == 8)
    gather_as(vectors, n, D, stride_feature, (uint64_t *)to);
  else if (size == 4)
    gather_as(vectors, n, D, stride_feature, (uint32_t *)to);
  else
    gather_as(vectors, n, D, stride_feature, (uint16_t *)to);
}

}  // namespace vqfast
