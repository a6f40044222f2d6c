// Distances, products and cosines in twice the precision of float64: the last word where float64 cannot separate two
// codes.
//
// For float32, bfloat16 and float16 input a difference fits in two float64s exactly and its square is exact to 2^-104;
// a product is exact. A sum is off by less than D 2^-104 of the sum of its terms' magnitudes. Must be compiled without
// contraction of a * b + c.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define VQFAST_HD __host__ __device__
#else
#define VQFAST_HD
#endif

namespace vqfast {

struct Double2 {
  double high, low;
};

VQFAST_HD inline bool operator<(Double2 a, Double2 b) { return a.high < b.high || (a.high == b.high && a.low < b.low); }

// a + b without error (Knuth).
VQFAST_HD inline Double2 two_sum(double a, double b) {
  const double s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}

// a * b, rounded before it is added to anything: nvcc would fuse the two.
VQFAST_HD inline double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// sum + (a - b)^2.
VQFAST_HD inline Double2 add_squared_difference(Double2 sum, double a, double b) {
  const Double2 d = two_sum(a, -b);
  const double square = rounded_product(d.high, d.high);
  const double rest = fma(d.high, d.high, -square) + 2 * d.high * d.low;
  const Double2 s = two_sum(sum.high, square);
  const double low = sum.low + (s.low + rest);
  const double high = s.high + low;
  return {high, low - (high - s.high)};
}

// a + b, rounded to twice float64.
VQFAST_HD inline Double2 add(Double2 a, Double2 b) {
  const Double2 s = two_sum(a.high, b.high);
  const double low = s.low + (a.low + b.low), high = s.high + low;
  return {high, low - (high - s.high)};
}

// a * b without error.
VQFAST_HD inline Double2 two_product(double a, double b) {
  const double product = rounded_product(a, b);
  return {product, fma(a, b, -product)};
}

// sum + a * b.
VQFAST_HD inline Double2 add_product(Double2 sum, double a, double b) { return add(sum, two_product(a, b)); }

VQFAST_HD inline Double2 multiply(Double2 a, Double2 b) {
  const Double2 p = two_product(a.high, b.high);
  const double low = p.low + (a.high * b.low + a.low * b.high), high = p.high + low;
  return {high, low - (high - p.high)};
}

// 1 / b to 2^-51.
VQFAST_HD inline double reciprocal(double b) {
#ifdef __CUDA_ARCH__
  // By Newton's steps from the hardware's 20 bits: nvcc's division is a call, for which the kernel would need a stack.
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(b));
  r = fma(r, fma(-b, r, 1.0), r);
  return fma(r, fma(-b, r, 1.0), r);
#else
  return 1 / b;
#endif
}

// a / b for b > 0.
VQFAST_HD inline Double2 divide(Double2 a, Double2 b) {
  const double inverse = reciprocal(b.high), first = a.high * inverse;
  const Double2 part = multiply({first, 0}, b), rest = add(a, {-part.high, -part.low});
  const double second = rest.high * inverse;
  const Double2 more = multiply({second, 0}, b), left = add(rest, {-more.high, -more.low});
  return add({first, second}, {left.high * inverse, 0});
}

// The square of a cosine with the cosine's sign, but for the factor 1 / ||x||^2 that all codes share: p |p| / n of
// p = x . c and n = ||c||^2. There is no square root, so equal cosines differ by the rounding of twice float64 only. 0
// for a zero code.
VQFAST_HD inline Double2 signed_square_cosine(Double2 p, Double2 n) {
  if (n.high == 0) return {0, 0};
  const Double2 ratio = divide(multiply(p, p), n);
  return p.high < 0 ? Double2{-ratio.high, -ratio.low} : ratio;
}

// Squares of cosines closer than this, relative to themselves, tie: their rounding stays below 2^-99.
constexpr double kEqualCosines = 0x1p-96;

// Whether a is greater than b by more than `slack` of b: 0, or what rounding may have put between equals.
VQFAST_HD inline bool exceeds(Double2 a, Double2 b, double slack) {
  if (slack == 0) return b < a;
  return (a.high - b.high) + (a.low - b.low) > slack * fabs(b.high);
}

}  // namespace vqfast
