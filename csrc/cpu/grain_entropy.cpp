// Entropy of image patches by a soft histogram that lives in registers and cache, never in memory.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "buffer.h"
#include "convert.h"
#include "dispatch.h"
#include "vqfast.h"

namespace vqfast {
namespace {

constexpr double kGrey[3] = {0.2989, 0.587, 0.114};  // ITU-R BT.601
constexpr double kEpsilon = 1e-40;

template <class T>
struct Entropy {
  const T *images;
  int64_t C, P, bins;
  const int64_t *strides;
  double sigma, lowest, spacing;

  // Beyond this distance a float32 weight is 0, and a float64 one too small to show in the sum of a patch.
  static constexpr double kReach = sizeof(T) == 8 ? 39 : 14;

  double grey(const T *pixel) const {
    if (C == 1) return widen(*pixel);
    double value = 0;
    for (int64_t c = 0; c < 3; ++c) value += kGrey[c] * (double)widen(pixel[c * strides[1]]);
    return value;
  }

  double operator()(int64_t b, int64_t y, int64_t x, double *density) const {
    typedef decltype(widen(T())) Real;
    const double reach = kReach * sigma;
    std::fill(density, density + bins, 0.0);
    for (int64_t i = 0; i < P; ++i)
      for (int64_t j = 0; j < P; ++j) {
        const double v = grey(images + b * strides[0] + (y * P + i) * strides[2] + (x * P + j) * strides[3]);
        if (v != v) return v;
        // In floating point: an integer may not hold what is out of range.
        const double first = std::clamp(std::ceil((v - reach - lowest) / spacing), 0.0, (double)bins);
        const double last = std::clamp(std::floor((v + reach - lowest) / spacing), -1.0, (double)(bins - 1));
        for (int64_t k = (int64_t)first; k <= (int64_t)last; ++k) {
          const double distance = (v - (lowest + (double)k * spacing)) / sigma;
          density[k] += (double)std::exp((Real)(-distance * distance / 2));
        }
      }
    double total = 0, entropy = 0;
    for (int64_t k = 0; k < bins; ++k) total += density[k];
    const double pixels = (double)(P * P);
    for (int64_t k = 0; k < bins; ++k) {
      const double p = density[k] / pixels / (total / pixels + kEpsilon) + kEpsilon;
      entropy -= p * std::log(p);
    }
    return entropy;
  }
};

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_grain_entropy(vqfast_dtype dtype, const void *images, int64_t B, int64_t C, int64_t H,
                                        int64_t W, const int64_t *strides, int64_t P, int64_t bins, double sigma,
                                        double lowest, double highest, void *entropy) {
  const int64_t rows = H / P, columns = W / P;
  bool enough = true;
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_const_t<std::remove_pointer_t<decltype(type)>> T;
    const Entropy<T> patch = {(const T *)images, C, P, bins, strides, sigma, lowest,
                              (highest - lowest) / (double)(bins - 1)};
#pragma omp parallel reduction(&& : enough) if (B * H * W > kParallelElements / 8)
    {
      Buffer<double> density = buffer<double>(bins);
      enough = density != nullptr;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < B * rows * columns; ++i) {
        if (!density) continue;
        const double value = patch(i / (rows * columns), i / columns % rows, i % columns, density.get());
        if (dtype == VQFAST_F64)
          ((double *)entropy)[i] = value;
        else
          ((float *)entropy)[i] = (float)value;
      }
    }
  });
  if (!known) return VQFAST_BAD_DTYPE;
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}
