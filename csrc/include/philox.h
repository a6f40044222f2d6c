// Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) for host and device code.
// The same numbers as kernels/philox.py: a pure function of (key, row, draw).
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define VQFAST_HD __host__ __device__ __forceinline__
#else
#define VQFAST_HD inline
#endif

namespace vqfast {

struct RandomBits {
  uint64_t first, second;
};

VQFAST_HD RandomBits philox(uint64_t key0, uint64_t key1, uint64_t row, uint32_t draw) {
  uint32_t c0 = (uint32_t)row, c1 = (uint32_t)(row >> 32), c2 = draw, c3 = (uint32_t)key1;
  uint32_t k0 = (uint32_t)key0, k1 = (uint32_t)(key0 >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = (uint64_t)0xD2511F53u * c0, product1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)product1;
    c2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)product0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0 | (uint64_t)c1 << 32, c2 | (uint64_t)c3 << 32};
}

// In [0, 1), from the top 53 bits.
VQFAST_HD double uniform(uint64_t bits) { return (double)(bits >> 11) * 0x1p-53; }

// In 0..bound-1, for bound < 2^31: the high word of bits * bound.
VQFAST_HD int64_t below(uint64_t bits, int64_t bound) {
  const uint64_t high = bits >> 32, low = bits & 0xFFFFFFFFu, b = (uint64_t)bound;
  return (int64_t)((high * b + (low * b >> 32)) >> 32);
}

}  // namespace vqfast
