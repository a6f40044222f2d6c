// Exponential and logarithm of float vectors. Polynomials: least maximum relative error on the reduced range.
#pragma once

#include "simd.h"

namespace vqfast::VQFAST_ISA {

// exp(x) for x <= 88, within 1 ulp. Below exp(-87.33), the smallest normal float, it is 0; NaN stays NaN.
static inline __attribute__((always_inline)) vf exp(vf x) {
  // Adding 1.5 * 2^23 rounds to an integer in the low bits of the float; 127 more makes it the exponent's bits.
  const vf shift = splat(12582912.0f + 127.0f);
  const vf t = x * splat(0x1.715476p+0f) + shift;
  const vf n = t - shift;
  // ln 2 in two parts, the first of 10 bits: n times it is exact.
  const vf r = (x - n * splat(0x1.63p-1f)) - n * splat(-0x1.bd0106p-13f);
  vf p = splat(0x1.6a2352p-10f);
  p = p * r + splat(0x1.123a6cp-7f);
  p = p * r + splat(0x1.5558f4p-5f);
  p = p * r + splat(0x1.555490p-3f);
  p = p * r + splat(0x1.fffffcp-2f);
  p = r + r * r * p;
  const vf scale = (vf)((vu)t << 23);
  return x < splat(-87.33f) ? (vf){} : scale + scale * p;
}

// log(1 + r) - r for 0 <= r < 1e36, relative error below 2e-6: no digit is lost where r is small. u = 1 + r.
static inline __attribute__((always_inline)) vf log1p_minus(vf r, vf u) {
  // 1 + r = 2^e (1 + f), f in [-1/3, 1/3]. 2^-e and 2^-e - 1 are exact, so f has one rounding, and none where e = 0.
  const vi e = ((vi)u - (vi)splat(2.0f / 3.0f)) >> 23;
  const vf s = (vf)((vi)splat(1.0f) - (e << 23));
  const vf f = r * s + (s - splat(1.0f));
  vf p = splat(-0.12577850f);
  p = p * f + splat(0.13746133f);
  p = p * f + splat(-0.12255136f);
  p = p * f + splat(0.14056425f);
  p = p * f + splat(-0.16675519f);
  p = p * f + splat(0.20007181f);
  p = p * f + splat(-0.24999902f);
  p = p * f + splat(0.33333274f);
  const vf square = f * f;
  p = square * f * p - splat(0.5f) * square;
  return (__builtin_convertvector(e, vf) * splat(0x1.62e430p-1f) + (f - r)) + p;
}

}  // namespace vqfast::VQFAST_ISA
