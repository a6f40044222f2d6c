// Squared distance in twice the precision of float64: the last word where float64 cannot separate two codes.
//
// For float32, bfloat16 and float16 input a difference fits in two float64s exactly and its square is exact to 2^-104;
// the sum keeps a relative error below D 2^-104. Must be compiled without contraction of a * b + c.
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

VQFAST_HD inline bool operator<(Double2 a, Double2 b) {
  return a.high < b.high || (a.high == b.high && a.low < b.low);
}

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

}  // namespace vqfast
