// Codebook lookup of images with several grains on their fine grid, its error, and its gradient.
#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "dispatch.h"
#include "grain_grid.h"
#include "grain_vectors.h"

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

// The same for every row of cells, the rows in parallel; `scratch` has room for two vectors.
template <class T, class Body>
int with_all_codes(const GrainGrid &grid, const int64_t *grains, int64_t D, Body body) {
  const int64_t rows = grid.images * grid.cells_y;
  bool enough = true;
#pragma omp parallel reduction(&& : enough) if (grid.images * grid.positions() * D > kParallelElements)
  {
    Buffer<T> scratch = buffer<T>(2 * D);
    enough = scratch != nullptr;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row)
      if (scratch)
        with_codes(grid, grains + row * grid.cells_x, row * grid.factor() * grid.width(),
                   [&](int64_t first, int64_t edge) { body(first, edge, scratch.get()); });
  }
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}

// A vector where it lies, or gathered.
template <class T>
const T *side_by_side(const Vectors<T> &vectors, int64_t n, T *scratch) {
  if (vectors.stride_feature == 1) return vectors.row(n);
  vectors.copy(n, scratch);
  return scratch;
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
    code = with_all_codes<T>(grid, grains, D, [&](int64_t first, int64_t edge, T *scratch) {
      const T *chosen = (const T *)codebook + indices[first] * D;
      for (int64_t y = 0; y < edge; ++y)
        for (int64_t x = 0; x < edge; ++x) {
          const int64_t n = first + y * grid.width() + x;
          std::memcpy((T *)quantized + n * D, chosen, D * sizeof(T));
          set_error(n, 0);
        }
      set_error(first, isa.squared_error(dtype, side_by_side(vectors, first, scratch), chosen, D));
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
                                                  const void *codebook, const int64_t *indices,
                                                  const int64_t *grains, int64_t B, int64_t Hc, int64_t Wc,
                                                  int64_t num_grains, void *grad_features) {
  const GrainGrid grid = {B, Hc, Wc, (int)num_grains};
  const Kernels &isa = kernels();
  int code = VQFAST_OK;
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_const_t<std::remove_pointer_t<decltype(type)>> T;
    const Vectors<T> vectors(features, D), grad(grad_quantized, D);
    code = with_all_codes<T>(grid, grains, D, [&](int64_t first, int64_t edge, T *scratch) {
      const T *through = scratch;
      if (edge == 1)
        through = side_by_side(grad, first, scratch);
      else
        sum_square(grad, first, grid.width(), edge, scratch);
      T *out = (T *)grad_features;
      for (int64_t y = 0; y < edge; ++y)
        for (int64_t x = !y; x < edge; ++x) std::memset((void *)(out + (first + y * grid.width() + x) * D), 0, D * sizeof(T));
      isa.lookup_grad(dtype, through, 2 * scalar_at(dtype, grad_error, first),
                      side_by_side(vectors, first, scratch + D), (const T *)codebook + indices[first] * D, D,
                      out + first * D);
    });
  });
  return known ? code : (int)VQFAST_BAD_DTYPE;
}
