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

  // Sigmas beyond which a float32 weight is 0, and a float64 one too small to show in the sum of a patch.
  static constexpr double kReach = sizeof(T) == 8 ? 39 : 14;

  double grey_level(const T *pixel) const {
    if (C == 1) return widen(*pixel);
    double value = 0;
    for (int64_t c = 0; c < 3; ++c) value += kGrey[c] * (double)widen(pixel[c * strides[1]]);
    return value;
  }

  // What n grey levels add to the bins.
  void add(const double *grey, int64_t n, double *density) const {
    if constexpr (sizeof(T) < 8) {
      kernels().add_bins(grey, n, lowest, sigma, spacing / sigma, kReach, bins, density);
      return;
    }
    const double reach = kReach * sigma;
    for (int64_t j = 0; j < n; ++j) {
      // In floating point: an integer may not hold what is out of range.
      const double first = std::clamp(std::ceil((grey[j] - reach - lowest) / spacing), 0.0, (double)bins);
      const double last = std::clamp(std::floor((grey[j] + reach - lowest) / spacing), -1.0, (double)(bins - 1));
      for (int64_t k = (int64_t)first; k <= (int64_t)last; ++k) {
        const double distance = (grey[j] - (lowest + (double)k * spacing)) / sigma;
        density[k] += std::exp(-distance * distance / 2);
      }
    }
  }

  // scratch: the bins, a vector more, and the grey levels of a patch. These go first: a short loop, so that the memory
  // of many rows is asked for at once.
  double operator()(int64_t b, int64_t y, int64_t x, double *scratch) const {
    double *const density = scratch, *const grey = scratch + bins + kMostLanes;
    const T *patch = images + b * strides[0] + y * P * strides[2] + x * P * strides[3];
    bool known = true;
    for (int64_t i = 0; i < P; ++i)
      for (int64_t j = 0; j < P; ++j) {
        const double v = grey_level(patch + i * strides[2] + j * strides[3]);
        grey[i * P + j] = v;
        known &= v == v;
      }
    if (!known) return NAN;
    std::fill(scratch, grey, 0.0);
    add(grey, P * P, density);
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
    const Entropy<T> patch = {(const T *)images, C,     P,      bins,
                              strides,           sigma, lowest, (highest - lowest) / (double)(bins - 1)};
#pragma omp parallel reduction(&& : enough) if (B * H * W > kParallelElements / 8)
    {
      Buffer<double> scratch = buffer<double>(bins + kMostLanes + P * P);
      enough = scratch != nullptr;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < B * rows * columns; ++i) {
        if (!scratch) continue;
        const double value = patch(i / (rows * columns), i / columns % rows, i % columns, scratch.get());
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
