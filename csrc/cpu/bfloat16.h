// Rounding to bfloat16, to nearest and even, eight at a time.
#pragma once

#include <stdint.h>

#include "nearest_pack.h"

namespace vqfast::VQFAST_ISA {

typedef uint16_t vh8 __attribute__((vector_size(16)));
typedef uint16_t vh8_unaligned __attribute__((vector_size(16), aligned(2), may_alias));

static inline __attribute__((always_inline)) vfw round_to_bfloat16(vfw v) {
  const vuw bits = (vuw)v;
  return (vfw)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

// Of values that are bfloat16 already.
static inline __attribute__((always_inline)) vh8 bfloat16_bits(vfw v) {
  return __builtin_convertvector((vuw)v >> 16, vh8);
}

}  // namespace vqfast::VQFAST_ISA
