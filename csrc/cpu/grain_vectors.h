// Vectors on the fine grid of images with several grains, read from any view.
#pragma once

#include <algorithm>
#include <cstring>

#include "convert.h"
#include "gather.h"
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
  // Vectors first..first+n-1 with their features side by side: these, or gathered. scratch: n * gathered_pitch
  // elements, not read where features are side by side already.
  Vectors side_by_side(int64_t first, int64_t n, T *scratch) const {
    if (stride_feature == 1) return *this;
    constexpr int64_t kTogether = kMostTogether;
    Vectors gathered = *this;
    gathered.rows = INT64_MAX;
    gathered.stride_row = gathered_pitch(D, sizeof(T));
    gathered.stride_feature = 1;
    gathered.data = scratch - first * gathered.stride_row;
    for (int64_t begin = 0; begin < n; begin += kTogether) {
      const void *at[kTogether];
      const int64_t count = std::min(kTogether, n - begin);
      for (int64_t i = 0; i < count; ++i) at[i] = row(first + begin + i);
      gather(sizeof(T), at, count, D, stride_feature, scratch + begin * gathered.stride_row);
    }
    return gathered;
  }
  // Those that a code of `edge` rows and columns covers, of an image `width` wide: these, or gathered. scratch: edge^2
  // * gathered_pitch elements, not used where features are side by side already.
  Square square(int64_t first, int64_t width, int64_t edge, T *scratch) const {
    const T *at = row(first);
    if (edge == 1 && stride_feature == 1) return {at, 1, 0, 0};
    // An image's rows lie as far apart as its first two.
    if (stride_feature == 1) return {at, edge, row(first + 1) - at, row(first + width) - at};
    const int64_t pitch = gathered_pitch(D, sizeof(T));
    const void *vectors[kMostTogether];
    for (int64_t i = 0; i < edge * edge; i += kMostTogether) {
      const int64_t count = std::min<int64_t>(kMostTogether, edge * edge - i);
      for (int64_t j = 0; j < count; ++j) vectors[j] = row(first + (i + j) / edge * width + (i + j) % edge);
      gather(sizeof(T), vectors, count, D, stride_feature, scratch + i * pitch);
    }
    return {scratch, edge, pitch, edge * pitch};
  }
  void copy(int64_t n, T *to) const { copy(row(n), to); }
  void copy(const T *from, T *to) const {
    if (stride_feature == 1)
      std::memcpy(to, from, D * sizeof(T));
    else
      for (int64_t d = 0; d < D; ++d) to[d] = from[d * stride_feature];
  }
};

}  // namespace vqfast
