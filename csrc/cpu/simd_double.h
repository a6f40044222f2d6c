// Exponential and logarithm of float64 vectors, for the passes in which a float32 would not do.
#pragma once

#include "simd_elements.h"

namespace vqfast::VQFAST_ISA {

typedef uint64_t vw __attribute__((vector_size(4 * VQFAST_LANES)));
typedef uint64_t vw_unaligned __attribute__((vector_size(4 * VQFAST_LANES), aligned(8), may_alias));

constexpr int kDoubles = VQFAST_LANES / 2;

static inline __attribute__((always_inline)) vd max(vd a, vd b) { return a > b ? a : b; }

// exp(x) for x <= 0, within 2 ulp. Below exp(-708.39), the smallest normal double, it is 0; NaN stays NaN.
static inline __attribute__((always_inline)) vd exp(vd x) {
  // Adding 1.5 * 2^52 rounds to an integer in the low bits of the double; 1023 more makes it the exponent's bits.
  const vd shift = splat(0x1.8p52 + 1023);
  const vd t = x * splat(0x1.71547652b82fep+0) + shift, n = t - shift;
  // ln 2 in two parts, the first of 32 bits: n times it is exact.
  const vd r = (x - n * splat(0x1.62e42fee00000p-1)) - n * splat(0x1.a39ef35793c76p-33);
  // The series of exp: |r| < 0.347, and r^14 / 14! is 4e-18.
  vd p = splat(1.0 / 6227020800);
  p = p * r + splat(1.0 / 479001600);
  p = p * r + splat(1.0 / 39916800);
  p = p * r + splat(1.0 / 3628800);
  p = p * r + splat(1.0 / 362880);
  p = p * r + splat(1.0 / 40320);
  p = p * r + splat(1.0 / 5040);
  p = p * r + splat(1.0 / 720);
  p = p * r + splat(1.0 / 120);
  p = p * r + splat(1.0 / 24);
  p = p * r + splat(1.0 / 6);
  p = p * r + splat(0.5);
  p = r + r * r * p;
  const vd scale = (vd)((vw)t << 52);
  return x < splat(-708.39) ? (vd){} : scale + scale * p;
}

// log(x) for normal x > 0, within 3 ulp; -infinity at 0, NaN stays NaN.
static inline __attribute__((always_inline)) vd log(vd x) {
  // x = 2^e (1 + f), 1 + f in [sqrt 1/2, sqrt 2); 2^62 keeps the difference of the bits positive.
  const vw least = (vw)splat(0x1.6a09e667f3bcdp-1), above = (vw){} + (1ull << 62);
  const vw exponent = ((vw)x - least + above) >> 52;
  const vd f = (vd)((vw)x - ((exponent - 1024) << 52)) - splat(1.0);
  const vd e = (vd)(exponent | (vw)splat(0x1p52)) - splat(0x1p52 + 1024);
  // log(1 + f) = 2 atanh(s): |s| < 0.172, and s^24 is 5e-19.
  const vd s = f / (f + splat(2.0)), square = s * s;
  vd p = splat(2.0 / 23);
  p = p * square + splat(2.0 / 21);
  p = p * square + splat(2.0 / 19);
  p = p * square + splat(2.0 / 17);
  p = p * square + splat(2.0 / 15);
  p = p * square + splat(2.0 / 13);
  p = p * square + splat(2.0 / 11);
  p = p * square + splat(2.0 / 9);
  p = p * square + splat(2.0 / 7);
  p = p * square + splat(2.0 / 5);
  p = p * square + splat(2.0 / 3);
  // 2 s = f - s f: the larger part without the error of the division.
  const vd smaller = s * (square * p - f) + e * splat(0x1.a39ef35793c76p-33);
  const vd whole = e * splat(0x1.62e42fee00000p-1) + (f + smaller);
  return x == (vd){} ? splat(-__builtin_inf()) : x == x ? whole : x;
}

}  // namespace vqfast::VQFAST_ISA
