// The four element types, and how a value of each becomes a wider one. Functions are static: this header is compiled
// once per instruction set.
#pragma once

#include <stdint.h>

#include "vqfast.h"

namespace vqfast {

struct bf16 {
  uint16_t bits;
};
typedef _Float16 f16;

static inline double widen(double v) { return v; }
static inline float widen(float v) { return v; }
static inline float widen(f16 v) { return (float)v; }
static inline float widen(bf16 v) {
  const uint32_t bits = (uint32_t)v.bits << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

static inline void narrow(double v, double &out) { out = v; }
static inline void narrow(float v, float &out) { out = v; }
static inline void narrow(float v, f16 &out) { out = (f16)v; }
static inline void narrow(float v, bf16 &out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out.bits = (uint16_t)(v == v ? rounded : bits >> 16 | 0x40);
}

static inline int64_t element_size(vqfast_dtype dtype) { return dtype == VQFAST_F64 ? 8 : dtype == VQFAST_F32 ? 4 : 2; }

// Calls body(T *) with a null pointer of the element type; false for an unknown dtype.
template <class Body>
static inline bool with_element(vqfast_dtype dtype, Body body) {
  switch (dtype) {
    case VQFAST_F32:
      body((const float *)nullptr);
      return true;
    case VQFAST_F64:
      body((const double *)nullptr);
      return true;
    case VQFAST_BF16:
      body((const bf16 *)nullptr);
      return true;
    case VQFAST_F16:
      body((const f16 *)nullptr);
      return true;
  }
  return false;
}

}  // namespace vqfast
