// Powers of two that bring numbers to the middle of float32's range: multiplying by one rounds nothing.
#pragma once

#include <math.h>

namespace vqfast {

// The power of two that brings `largest` to [1, 2); 1 where it is zero, infinite or NaN.
static inline double scale_to_one(double largest) {
  if (!(largest > 0 && largest < (double)INFINITY)) return 1;
  const int exponent = -ilogb(largest);
  return ldexp(1.0, exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent);
}

}  // namespace vqfast
