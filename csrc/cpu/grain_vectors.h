// Vectors on the fine grid of images with several grains: read from any view, and summed over what a code covers.
#pragma once

#include <algorithm>
#include <cstring>

#include "convert.h"
#include "vqfast.h"

namespace vqfast {

// Rows of D elements each, in place.
template <class T>
struct Vectors {
  const T *data;
  int64_t rows, stride_batch, stride_row, stride_feature, D;

  Vectors(const vqfast_rows &view, int64_t D)
      : data((const T *)view.data),
        rows(view.batch == 1 ? INT64_MAX : view.rows),
        stride_batch(view.stride_batch),
        stride_row(view.stride_row),
        stride_feature(view.stride_feature),
        D(D) {}

  const T *row(int64_t n) const {
    const int64_t b = n < rows ? 0 : n / rows;
    return data + b * stride_batch + (n - b * rows) * stride_row;
  }
  void copy(int64_t n, T *to) const { copy(row(n), to); }
  void copy(const T *from, T *to) const {
    if (stride_feature == 1)
      std::memcpy(to, from, D * sizeof(T));
    else
      for (int64_t d = 0; d < D; ++d) to[d] = from[d * stride_feature];
  }
};

// sum[d] = sum over the square of `edge` rows and columns whose top left is vector `first`, in the order of its rows.
template <class T>
void sum_square(const Vectors<T> &vectors, int64_t first, int64_t width, int64_t edge, T *sum) {
  constexpr int64_t kFeatures = 64;  // so many at a time
  for (int64_t d = 0; d < vectors.D; d += kFeatures) {
    const int64_t n = std::min(kFeatures, vectors.D - d), step = vectors.stride_feature;
    decltype(widen(T())) total[kFeatures] = {};
    for (int64_t dy = 0; dy < edge; ++dy)
      for (int64_t dx = 0; dx < edge; ++dx) {
        const T *row = vectors.row(first + dy * width + dx) + d * step;
        if (step == 1)
          for (int64_t i = 0; i < n; ++i) total[i] += widen(row[i]);
        else
          for (int64_t i = 0; i < n; ++i) total[i] += widen(row[i * step]);
      }
    for (int64_t i = 0; i < n; ++i) narrow(total[i], sum[d + i]);
  }
}

}  // namespace vqfast
