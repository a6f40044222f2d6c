// Which positions may come next, when codes are drawn grain by grain.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "grain_grid.h"
#include "vqfast.h"

namespace vqfast {
namespace {

// One image. The mask itself keeps the books: 1 while a position is free.
void mask_image(const GrainGrid &grid, const int64_t *positions, const int64_t *grain_ids, int64_t L, int grain,
                int64_t V, uint8_t *mask) {
  const int64_t count = grid.cells() << 2 * grain, columns = grid.cells_x << grain, edge = (int64_t)1 << grain;
  const int64_t pad = count, eos = count + 1;
  std::memset(mask, 1, count);
  std::memset(mask + count, 0, V - count);
  for (int64_t i = 0; i < L; ++i)
    if (grain_ids[i] == grain && positions[i] == eos) {
      std::memset(mask, 0, count);
      mask[pad] = 1;
      return;
    }
  int64_t taken_y, taken_x;
  // The top left of cell (y, x) on this grain's grid.
  const auto corner = [&](int64_t y, int64_t x) { return mask + (y << grain) * columns + (x << grain); };
  for (int64_t i = 0; i < L; ++i) {
    const int64_t g = grain_ids[i], p = positions[i];
    if (!grid.in_range(p, g)) continue;
    if (g == grain) {
      mask[p] = 0;
      continue;
    }
    grid.cell(p, (int)g, taken_y, taken_x);
    for (int64_t y = 0; y < edge; ++y) std::memset(corner(taken_y, taken_x) + y * columns, 0, edge);
  }
  bool unfinished = false;
  if (grain == grid.grains - 1)
    unfinished = std::memchr(mask, 1, count) != nullptr;
  else
    for (int64_t i = 0; i < L && !unfinished; ++i) {
      if (grain_ids[i] != grain || !grid.in_range(positions[i], grain)) continue;
      grid.cell(positions[i], grain, taken_y, taken_x);
      for (int64_t y = 0; y < edge; ++y)
        unfinished = unfinished || std::memchr(corner(taken_y, taken_x) + y * columns, 1, edge) != nullptr;
    }
  mask[eos] = !unfinished;
}

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_position_mask(const int64_t *positions, const int64_t *grain_ids, const int64_t *grain,
                                        int64_t B, int64_t L, int64_t Hc, int64_t Wc, int64_t num_grains, int64_t V,
                                        uint8_t *mask) {
  const GrainGrid grid = {B, Hc, Wc, (int)num_grains};
  for (int64_t b = 0; b < B; ++b)
    if (grain[b] < 0 || grain[b] >= num_grains) return VQFAST_OUT_OF_RANGE;
#pragma omp parallel for schedule(dynamic) if (B * (L + V) > kParallelElements)
  for (int64_t b = 0; b < B; ++b)
    mask_image(grid, positions + b * L, grain_ids + b * L, L, (int)grain[b], V, mask + b * V);
  return VQFAST_OK;
}
