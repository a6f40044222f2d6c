// Which way of searching was fastest at which size, and the measured size next to a given one. nearest_paths.inc is the
// table; `python -m bench.search_paths --write` makes the rows of a CPU, `python -m bench.search_scores --write` those
// of a CUDA device.
#pragma once

#include <stdint.h>

#include <cmath>
#include <cstring>
#include <vector>

namespace vqfast {

constexpr int kMostPaths = 12;

// A line of the table: a device with the names of its ways, or a size with their times on the device above it.
struct PathsLine {
  const char *device;  // the instruction set, or "sm_90" of a CUDA device; null for a size
  const char *names[kMostPaths];
  int64_t N, K, D;
  double milliseconds[kMostPaths];  // 0: that way cannot serve this size, or was wrong there
};

constexpr PathsLine kMeasuredPaths[] = {
#define DEVICE(device, ...) {device, {__VA_ARGS__}, 0, 0, 0, {}},
#define SHAPE(N, K, D, ...) {nullptr, {}, N, K, D, {__VA_ARGS__}},
#include "nearest_paths.inc"
#undef DEVICE
#undef SHAPE
    {nullptr, {}, 0, 0, 0, {}},
};

// The sizes that were measured on one device.
class MeasuredShapes {
 public:
  // `lines` end with one of neither kind.
  explicit MeasuredShapes(const char *device, const PathsLine *lines = kMeasuredPaths) {
    const PathsLine *names = nullptr;
    for (; lines->device || lines->N > 0; ++lines) {
      if (lines->device)
        names = std::strcmp(lines->device, device) == 0 ? lines : nullptr;
      else if (names)
        shapes_.push_back({names, lines, Logs(lines->N, lines->K, lines->D)});
    }
  }

  int count() const { return (int)shapes_.size(); }

  // The number of the size next to this one, by the distance in the logarithms of N, K and D, the first of several; -1
  // if there are none.
  int nearest(int64_t N, int64_t K, int64_t D) const {
    const Logs wanted(N, K, D);
    int best = -1;
    float least = 0;
    for (int i = 0; i < count(); ++i) {
      const float distance = shapes_[i].logs.squared_distance(wanted);
      if (best < 0 || distance < least) best = i, least = distance;
    }
    return best;
  }

  // The fastest way at size i that serves(name) is true of; null where there is none.
  template <class Serves>
  const char *fastest(int i, Serves serves) const {
    const char *best = nullptr;
    double least = 0;
    for (int j = 0; j < kMostPaths; ++j) {
      const char *name = shapes_[i].names->names[j];
      const double time = shapes_[i].times->milliseconds[j];
      if (name && time > 0 && (!best || time < least) && serves(name)) best = name, least = time;
    }
    return best;
  }

 private:
  struct Logs {
    float N, K, D;
    Logs(int64_t N, int64_t K, int64_t D) : N(log2(N)), K(log2(K)), D(log2(D)) {}
    static float log2(int64_t size) { return std::log2((float)(size > 1 ? size : 1)); }
    float squared_distance(const Logs &other) const {
      const float n = N - other.N, k = K - other.K, d = D - other.D;
      return n * n + k * k + d * d;
    }
  };
  struct Shape {
    const PathsLine *names, *times;
    Logs logs;
  };
  std::vector<Shape> shapes_;
};

}  // namespace vqfast
