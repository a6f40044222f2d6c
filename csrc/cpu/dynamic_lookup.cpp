// Codebook lookup of images with several grains on their fine grid, its error, and its gradient.
#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "dispatch.h"
#include "gather.h"
#include "grain_grid.h"
#include "grain_vectors.h"
#include "pages.h"

namespace vqfast {
namespace {

double scalar_at(vqfast_dtype dtype, const void *values, int64_t i) {
  return dtype == VQFAST_F64 ? ((const double *)values)[i] : ((const float *)values)[i];
}

// Calls body(first, edge) for each code of a row of cells: the position at its top left, and the edge of its square.
template <class Body>
void with_codes(const GrainGrid &grid, const int64_t *map, int64_t first, Body body) {
  for (int64_t cx = 0; cx < grid.cells_x; ++cx) {
    const int64_t edge = (int64_t)1 << grid.shift(grid.clamped(map[cx]));
    for (int64_t y = 0; y < grid.factor(); y += edge)
      for (int64_t x = 0; x < grid.factor(); x += edge) body(first + y * grid.width() + cx * grid.factor() + x, edge);
  }
}

// Calls body(map, first, scratch) for each row of cells, in parallel: its grains and its first position. `elements`: of
// the scratch.
template <class T, class Body>
int with_rows(const GrainGrid &grid, const int64_t *grains, int64_t D, int64_t elements, Body body) {
  bool enough = true;
#pragma omp parallel reduction(&& : enough) if (grid.images * grid.positions() * D > kParallelElements)
  {
    const Buffer<T> scratch = buffer<T>(elements);
    enough = scratch != nullptr;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < grid.images * grid.cells_y; ++row)
      if (scratch) body(grains + row * grid.cells_x, row * grid.factor() * grid.width(), scratch.get());
  }
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}

// Of scratch that the vectors of a row of cells need to lie side by side.
template <class T>
int64_t apart(const Vectors<T> &vectors, const GrainGrid &grid) {
  return vectors.stride_feature == 1 ? 0 : grid.factor() * grid.width() * gathered_pitch(vectors.D, sizeof(T));
}

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_dynamic_lookup(vqfast_dtype dtype, vqfast_rows features, int64_t D, const void *codebook,
                                         int64_t K, const int64_t *indices, const int64_t *grains, int64_t B,
                                         int64_t Hc, int64_t Wc, int64_t num_grains, void *quantized, void *error,
                                         int64_t *counts) {
  const GrainGrid grid = {B, Hc, Wc, (int)num_grains};
  const Kernels &isa = kernels();
  prefer_large_pages(quantized, B * grid.positions() * D * element_size(dtype));
  int code = VQFAST_OK;
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_const_t<std::remove_pointer_t<decltype(type)>> T;
    const Vectors<T> vectors(features, D);
    const auto set_error = [&](int64_t n, double value) {
      if (dtype == VQFAST_F64)
        ((double *)error)[n] = value;
      else
        ((float *)error)[n] = (float)value;
    };
    code = with_rows<T>(grid, grains, D, apart(vectors, grid), [&](const int64_t *map, int64_t begin, T *scratch) {
      const Vectors<T> here = vectors.side_by_side(begin, grid.factor() * grid.width(), scratch);
      with_codes(grid, map, begin, [&](int64_t first, int64_t edge) {
        const T *chosen = (const T *)codebook + indices[first] * D;
        for (int64_t y = 0; y < edge; ++y)
          for (int64_t x = 0; x < edge; ++x) {
            const int64_t n = first + y * grid.width() + x;
            std::memcpy((T *)quantized + n * D, chosen, D * sizeof(T));
            set_error(n, 0);
          }
        set_error(first, isa.squared_error(dtype, here.row(first), chosen, D));
      });
    });
  });
  if (!known) return VQFAST_BAD_DTYPE;
  std::fill(counts, counts + K, 0);
  for (int64_t row = 0; row < B * Hc; ++row)
    with_codes(grid, grains + row * Wc, row * grid.factor() * grid.width(),
               [&](int64_t first, int64_t) { ++counts[indices[first]]; });
  return code;
}

extern "C" int vqfast_cpu_dynamic_lookup_backward(vqfast_dtype dtype, vqfast_rows grad_quantized,
                                                  const void *grad_error, vqfast_rows features, int64_t D,
                                                  const void *codebook, const int64_t *indices, const int64_t *grains,
                                                  int64_t B, int64_t Hc, int64_t Wc, int64_t num_grains,
                                                  void *grad_features) {
  const GrainGrid grid = {B, Hc, Wc, (int)num_grains};
  const Kernels &isa = kernels();
  prefer_large_pages(grad_features, B * grid.positions() * D * element_size(dtype));
  int code = VQFAST_OK;
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_const_t<std::remove_pointer_t<decltype(type)>> T;
    const Vectors<T> vectors(features, D), grad(grad_quantized, D);
    const int64_t positions = grid.factor() * grid.width(), elements = apart(vectors, grid) + apart(grad, grid);
    code = with_rows<T>(grid, grains, D, elements, [&](const int64_t *map, int64_t begin, T *scratch) {
      const Vectors<T> here = vectors.side_by_side(begin, positions, scratch);
      const Vectors<T> back = grad.side_by_side(begin, positions, scratch + apart(vectors, grid));
      with_codes(grid, map, begin, [&](int64_t first, int64_t edge) {
        const Square square = back.square(first, grid.width(), edge, nullptr);
        T *out = (T *)grad_features;
        for (int64_t y = 0; y < edge; ++y)
          for (int64_t x = !y; x < edge; ++x)
            std::memset((void *)(out + (first + y * grid.width() + x) * D), 0, D * sizeof(T));
        isa.lookup_grad(dtype, square, 2 * scalar_at(dtype, grad_error, first), here.row(first),
                        (const T *)codebook + indices[first] * D, D, out + first * D);
      });
    });
  });
  return known ? code : (int)VQFAST_BAD_DTYPE;
}
