// Rounding to bfloat16, to nearest and even, in integer arithmetic that the compiler turns into vectors.
#pragma once

#include <stdint.h>

#include "simd.h"

namespace vqfast::VQFAST_ISA {

static inline uint16_t to_bfloat16(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float from_bfloat16(uint16_t v) {
  const uint32_t bits = (uint32_t)v << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

}  // namespace vqfast::VQFAST_ISA
