// The random bits of many rows: philox.h, a row a lane.
#pragma once

#include "dispatch.h"
#include "simd_double.h"

namespace vqfast::VQFAST_ISA {

// Of the low halves of the lanes; what stands above them is not read.
static inline __attribute__((always_inline)) vw product_of_halves(vw a, vw b) {
#if defined(__AVX512F__)
  return (vw)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // the plain one warns in GCC 12
#elif defined(__AVX2__)
  return (vw)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vw)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Those of rows row..row + kRandomRows - 1. A word of the counter is the low half of its lane; above it is what came up
// on the way.
static void random_rows(uint64_t key0, uint64_t key1, uint64_t row, uint32_t draw, uint64_t *first, uint64_t *second) {
  const vw zero = {}, low = zero + 0xFFFFFFFFu, times0 = zero + 0xD2511F53u, times1 = zero + 0xCD9E8D57u;
  vw lane;
  for (int i = 0; i < kDoubles; ++i) lane[i] = i;
  for (int64_t i = 0; i < kRandomRows; i += kDoubles) {
    const vw rows = lane + (row + i);
    vw c0 = rows, c1 = rows >> 32, c2 = zero + draw, c3 = zero + key1;
    uint32_t k0 = (uint32_t)key0, k1 = (uint32_t)(key0 >> 32);
    for (int round = 0; round < 10; ++round) {
      const vw product0 = product_of_halves(times0, c0), product1 = product_of_halves(times1, c2);
      c0 = (product1 >> 32) ^ c1 ^ k0;
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ k1;
      c3 = product0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    *(vw_unaligned *)(first + i) = (c0 & low) | c1 << 32;
    *(vw_unaligned *)(second + i) = (c2 & low) | c3 << 32;
  }
}

}  // namespace vqfast::VQFAST_ISA
