// Where codes of each grain lie on the fine grid. Read by the C++ and the CUDA kernels.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define VQFAST_HOST_DEVICE __host__ __device__
#else
#define VQFAST_HOST_DEVICE
#endif

namespace vqfast {

struct GrainGrid {
  int64_t images, cells_y, cells_x;
  int grains;  // how many there are

  VQFAST_HOST_DEVICE int64_t factor() const { return (int64_t)1 << (grains - 1); }
  VQFAST_HOST_DEVICE int64_t height() const { return cells_y << (grains - 1); }
  VQFAST_HOST_DEVICE int64_t width() const { return cells_x << (grains - 1); }
  VQFAST_HOST_DEVICE int64_t cells() const { return cells_y * cells_x; }
  VQFAST_HOST_DEVICE int64_t positions() const { return height() * width(); }

  // log2 of the edge of the square that a code of a grain covers.
  VQFAST_HOST_DEVICE int shift(int grain) const { return grains - 1 - grain; }

  VQFAST_HOST_DEVICE int clamped(int64_t grain) const {
    return grain < 0 ? 0 : grain >= grains ? grains - 1 : (int)grain;
  }

  VQFAST_HOST_DEVICE bool in_range(int64_t position, int64_t grain) const {
    return grain >= 0 && grain < grains && position >= 0 && position < cells() << (2 * grain);
  }

  // Row and column of a position on its grain's own grid.
  VQFAST_HOST_DEVICE void locate(int64_t position, int grain, int64_t &y, int64_t &x) const {
    const int64_t columns = cells_x << grain;
    // 32 bits take half as long.
    y = (uint64_t)(position | columns) >> 32 ? position / columns : (uint32_t)position / (uint32_t)columns;
    x = position - y * columns;
  }

  // Row and column of the cell that it lies in.
  VQFAST_HOST_DEVICE void cell(int64_t position, int grain, int64_t &y, int64_t &x) const {
    locate(position, grain, y, x);
    y >>= grain;
    x >>= grain;
  }

  // The same as `locate`; false for a position that is out of range, or whose cell has another grain in the map.
  VQFAST_HOST_DEVICE bool place(const int64_t *map, int64_t position, int64_t grain, int64_t &y, int64_t &x) const {
    if (!in_range(position, grain)) return false;
    locate(position, (int)grain, y, x);
    return map[(y >> grain) * cells_x + (x >> grain)] == grain;
  }
};

}  // namespace vqfast
