// Codes of images with several grains: into one sequence an image, back onto the fine grid, and the gradient of that.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "buffer.h"
#include "convert.h"
#include "dispatch.h"
#include "grain_grid.h"
#include "grain_vectors.h"
#include "pages.h"
#include "vqfast.h"

namespace vqfast {
namespace {

// Calls body with a null pointer of an unsigned type of that size; false for another size.
template <class Body>
bool with_bytes(int64_t bytes, Body body) {
  switch (bytes) {
    case 2:
      body((uint16_t *)nullptr);
      return true;
    case 4:
      body((uint32_t *)nullptr);
      return true;
    case 8:
      body((uint64_t *)nullptr);
      return true;
  }
  return false;
}

// The cells of a row of cells that have a grain; returns how many there are. A list in place of a branch for each:
// which cells have a grain is as good as random. Not inlined: its pointers would leave the registers.
[[gnu::noinline]] int64_t list_cells(const int64_t *__restrict map, int64_t cells_x, int grain,
                                     int64_t *__restrict cells) {
  int64_t n = 0;
  for (int64_t cx = 0; cx < cells_x; ++cx) {
    cells[n] = cx;
    n += map[cx] == grain;
  }
  return n;
}

// Calls body with the edge of a cell in codes of a grain, a constant where it is small: a cell's row of codes then
// moves as one vector.
template <class Body>
void with_edge(int grain, Body body) {
  if (grain == 0)
    body(std::integral_constant<int64_t, 1>());
  else if (grain == 1)
    body(std::integral_constant<int64_t, 2>());
  else
    body((int64_t)1 << grain);
}

template <class T>
struct Sequence {
  GrainGrid grid;
  Vectors<T> values;
  int64_t capacity;
  T *packed;
  int64_t *positions, *grain_ids;

  // Row y of a grain's grid, of that only the codes in cells[0..n-1], from token `token` on; returns the next.
  template <class Edge>
  int64_t write_row(int64_t first, int grain, Edge edge, int64_t y, const int64_t *__restrict cells, int64_t n,
                    int64_t token) const {
    const int shift = grid.shift(grain);
    // A row of the fine grid lies in one batch of the view.
    const T *__restrict row = values.row(first + (y << shift) * grid.width());
    const int64_t step = values.stride_row << shift, D = values.D, start = y * (grid.cells_x << grain);
    const int64_t kept = std::min<int64_t>(n * edge, capacity - token), whole = kept / edge;
    const auto each = [&](auto body) {
      for (int64_t i = 0; i < whole; ++i)
        for (int64_t j = 0; j < edge; ++j) body(i * edge + j, cells[i] * edge + j);
      for (int64_t i = whole * edge; i < kept; ++i) body(i, cells[whole] * edge + i - whole * edge);
    };
    int64_t *__restrict numbers = positions + token;
    T *__restrict to = packed + token * D;
    each([=](int64_t i, int64_t column) { numbers[i] = start + column; });
    if (D != 1)
      each([&](int64_t i, int64_t column) { values.copy(row + column * step, to + i * D); });
    else if (step == 1)
      each([=](int64_t i, int64_t column) { to[i] = row[column]; });
    else
      each([=](int64_t i, int64_t column) { to[i] = row[column * step]; });
    return token + kept;
  }

  // The tokens of an image, from token `token` on. cells: scratch, for a row of them.
  void write(int64_t image, const int64_t *map, bool region, int64_t token, int64_t *cells) const {
    const int64_t first = image * grid.positions();
    for (int g = 0; g < grid.grains; ++g)
      with_edge(g, [&](auto edge) {
        const int64_t begin = token;
        for (int64_t cy = 0; cy < grid.cells_y; ++cy) {
          const int64_t n = list_cells(map + cy * grid.cells_x, grid.cells_x, g, cells), together = region ? 1 : n;
          for (int64_t k = 0; k < n; k += together)
            for (int64_t y = cy * edge; y < (cy + 1) * edge; ++y)
              token = write_row(first, g, edge, y, cells + k, together, token);
        }
        std::fill(grain_ids + begin, grain_ids + token, g);
      });
  }
};

// Calls body(token, grain, y, x) for each token begin..end-1 that has the grain of its cell, with its row and column on
// the grid of that grain.
template <class Body>
void with_places(const GrainGrid grid, const int64_t *map, int64_t begin, int64_t end, const int64_t *positions,
                 const int64_t *grain_ids, Body body) {
  for (int64_t t = begin; t < end;) {
    // What depends on the grain alone, once for all that follow each other.
    const int64_t g = grain_ids[t];
    if (g < 0 || g >= grid.grains) {
      ++t;
      continue;
    }
    const int64_t columns = grid.cells_x << g, count = grid.cells() << 2 * g;
    const double row_of = 1 / (double)columns;
    for (; t < end && grain_ids[t] == g; ++t) {
      const int64_t position = positions[t];
      if (position < 0 || position >= count) continue;
      // A product in place of a division, which takes ten times as long. Half a column away from both edges of its row
      // a position below 2^51 is safe from rounding.
      const int64_t y = (int64_t)(((double)position + 0.5) * row_of), x = position - y * columns;
      if (map[(y >> g) * grid.cells_x + (x >> g)] == g) body(t, (int)g, y, x);
    }
  }
}

// The token whose value each position's code has, or -1, at the top left of what it covers; others are left as they
// are.
void fill_slots(const GrainGrid grid, const int64_t *map, int64_t begin, int64_t end, const int64_t *positions,
                const int64_t *grain_ids, int64_t *slots) {
  std::fill(slots, slots + grid.positions(), -1);
  with_places(grid, map, begin, end, positions, grain_ids, [=](int64_t t, int g, int64_t y, int64_t x) {
    const int shift = grid.shift(g);
    slots[(y << shift) * grid.width() + (x << shift)] = t;
  });
}

// Codes straight onto the grid of their image: writing one twice costs less than to look for the last.
template <class T>
void place_codes(const GrainGrid grid, const int64_t *map, int64_t begin, int64_t end, const int64_t *positions,
                 const int64_t *grain_ids, const T *__restrict values, int64_t stride, bool replicate,
                 T *__restrict out) {
  std::fill(out, out + grid.positions(), (T)0);
  const int64_t width = grid.width();
  with_places(grid, map, begin, end, positions, grain_ids, [=](int64_t t, int g, int64_t y, int64_t x) {
    const int shift = grid.shift(g);
    const T value = values[t * stride];
    T *row = out + (y << shift) * width + (x << shift);
    if (!shift || !replicate) {
      *row = value;
      return;
    }
    for (int64_t dy = 0; dy < (int64_t)1 << shift; ++dy, row += width)
      std::fill(row, row + ((int64_t)1 << shift), value);
  });
}

int64_t token_bound(const int32_t *cu_seqlens, int64_t image, int64_t T) {
  return std::clamp<int64_t>(cu_seqlens[image], 0, T);
}

// grid by value, here and above: what is written might else be its members.
template <class T>
void write_grid(const GrainGrid grid, const int64_t *map, const int64_t *slots, const Vectors<T> values, bool replicate,
                T *out) {
  const int64_t D = values.D, width = grid.width(), factor = grid.factor();
  for (int64_t y = 0; y < grid.height(); ++y) {
    const int64_t *row_map = map + (y >> (grid.grains - 1)) * grid.cells_x;
    for (int64_t cx = 0; cx < grid.cells_x; ++cx, out += factor * D) {
      const int shift = grid.shift(grid.clamped(row_map[cx]));
      const int64_t top = y >> shift << shift, left = cx * factor;
      const int64_t *row = slots + top * width + left;
      const int64_t square = ((int64_t)1 << shift) - 1;
      for (int64_t x = 0; x < factor; ++x) {
        const int64_t slot = row[x & ~square];
        if (slot >= 0 && (replicate || (top == y && !(x & square))))
          values.copy(values.data + slot * values.stride_row, out + x * D);
        else
          std::memset(out + x * D, 0, D * sizeof(T));
      }
    }
  }
}

// Sums over the squares of an image's tokens that are in `slots`. scratch: for the vectors of a cell, where their
// features lie apart.
template <class T>
void sum_squares(vqfast_dtype dtype, const GrainGrid &grid, int64_t image, int64_t begin, int64_t end,
                 const int64_t *positions, const int64_t *grain_ids, const int64_t *map, const int64_t *slots,
                 const Vectors<T> &grad, T *scratch, T *out) {
  const int64_t D = grad.D;
  const Kernels &isa = kernels();
  for (int64_t t = begin; t < end; ++t) {
    int64_t y, x;
    T *sum = out + t * D;
    const bool there = grid.place(map, positions[t], grain_ids[t], y, x);
    const int shift = there ? grid.shift((int)grain_ids[t]) : 0;
    const int64_t corner = there ? (y << shift) * grid.width() + (x << shift) : 0;
    if (!there || slots[corner] != t) {
      std::memset((void *)sum, 0, D * sizeof(T));
      continue;
    }
    const int64_t first = image * grid.positions() + corner, edge = (int64_t)1 << shift;
    if (edge == 1) {
      grad.copy(first, sum);
      continue;
    }
    isa.sum_square(dtype, grad.square(first, grid.width(), edge, scratch), D, sum);
  }
}

// Calls body(image, begin, end, slots) for each image, its tokens and their places.
template <class Body>
int with_slots(const GrainGrid &grid, int64_t T, int64_t D, const int32_t *cu_seqlens, const int64_t *positions,
               const int64_t *grain_ids, const int64_t *grains, Body body) {
  bool enough = true;
#pragma omp parallel reduction(&& : enough) if (grid.images * grid.positions() * D > kParallelElements)
  {
    Buffer<int64_t> slots = buffer<int64_t>(grid.positions());
    enough = slots != nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < grid.images; ++b) {
      if (!slots) continue;
      const int64_t begin = token_bound(cu_seqlens, b, T), end = token_bound(cu_seqlens, b + 1, T);
      fill_slots(grid, grains + b * grid.cells(), begin, end, positions, grain_ids, slots.get());
      body(b, begin, end, slots.get());
    }
  }
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_pack(int64_t element_bytes, vqfast_rows values, int64_t D, const int64_t *grains, int64_t B,
                               int64_t Hc, int64_t Wc, int64_t num_grains, int64_t region, int64_t capacity,
                               void *packed, int32_t *cu_seqlens, int64_t *positions, int64_t *grain_ids) {
  const GrainGrid grid = {B, Hc, Wc, (int)num_grains};
  cu_seqlens[0] = 0;
  for (int64_t b = 0, total = 0; b < B; ++b) {
    const int64_t *map = grains + b * grid.cells();
    int64_t known = 0;
    for (int g = 0; g < grid.grains; ++g) {
      const int64_t n = std::count(map, map + grid.cells(), g);
      known += n;
      total += n << 2 * g;
    }
    if (known != grid.cells()) return VQFAST_OUT_OF_RANGE;
    cu_seqlens[b + 1] = (int32_t)std::min(total, capacity);
  }
  prefer_large_pages(packed, capacity * D * element_bytes);
  bool enough = true;
  const bool known = with_bytes(element_bytes, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    const Sequence<T> sequence = {grid, Vectors<T>(values, D), capacity, (T *)packed, positions, grain_ids};
#pragma omp parallel reduction(&& : enough) if (B * grid.positions() * D > kParallelElements)
    {
      Buffer<int64_t> cells = buffer<int64_t>(Wc);
      enough = cells != nullptr;
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < B; ++b)
        if (cells) sequence.write(b, grains + b * grid.cells(), region != 0, cu_seqlens[b], cells.get());
    }
    const int64_t used = cu_seqlens[B];
    std::memset((T *)packed + used * D, 0, (capacity - used) * D * sizeof(T));
    std::fill(positions + used, positions + capacity, -1);
    std::fill(grain_ids + used, grain_ids + capacity, -1);
  });
  if (!known) return VQFAST_BAD_DTYPE;
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}

extern "C" int vqfast_cpu_unpack(int64_t element_bytes, vqfast_rows packed, int64_t D, const int32_t *cu_seqlens,
                                 const int64_t *positions, const int64_t *grain_ids, const int64_t *grains, int64_t B,
                                 int64_t Hc, int64_t Wc, int64_t num_grains, int64_t replicate, void *out) {
  const GrainGrid grid = {B, Hc, Wc, (int)num_grains};
  prefer_large_pages(out, B * grid.positions() * D * element_bytes);
  int code = VQFAST_OK;
  const bool known = with_bytes(element_bytes, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    const Vectors<T> values(packed, D);
    if (D == 1) {
      const int64_t tokens = packed.batch * packed.rows;
#pragma omp parallel for schedule(dynamic) if (B * grid.positions() > kParallelElements)
      for (int64_t b = 0; b < B; ++b)
        place_codes(grid, grains + b * grid.cells(), token_bound(cu_seqlens, b, tokens),
                    token_bound(cu_seqlens, b + 1, tokens), positions, grain_ids, values.data, packed.stride_row,
                    replicate != 0, (T *)out + b * grid.positions());
      return;
    }
    code = with_slots(grid, packed.batch * packed.rows, D, cu_seqlens, positions, grain_ids, grains,
                      [&](int64_t b, int64_t, int64_t, const int64_t *slots) {
                        write_grid(grid, grains + b * grid.cells(), slots, values, replicate != 0,
                                   (T *)out + b * grid.positions() * D);
                      });
  });
  return known ? code : (int)VQFAST_BAD_DTYPE;
}

extern "C" int vqfast_cpu_unpack_backward(vqfast_dtype dtype, vqfast_rows grad, int64_t D, const int32_t *cu_seqlens,
                                          const int64_t *positions, const int64_t *grain_ids, int64_t T,
                                          const int64_t *grains, int64_t B, int64_t Hc, int64_t Wc, int64_t num_grains,
                                          void *grad_packed) {
  const GrainGrid grid = {B, Hc, Wc, (int)num_grains};
  prefer_large_pages(grad_packed, T * D * element_size(dtype));
  int code = VQFAST_OK;
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_const_t<std::remove_pointer_t<decltype(type)>> Element;
    Element *out = (Element *)grad_packed;
    const Vectors<Element> rows(grad, D);
    const int64_t apart =
        rows.stride_feature == 1 ? 0 : grid.factor() * grid.factor() * gathered_pitch(D, sizeof(Element));
    bool enough = true;
    code = with_slots(grid, T, D, cu_seqlens, positions, grain_ids, grains,
                      [&](int64_t b, int64_t begin, int64_t end, const int64_t *slots) {
                        const Buffer<Element> scratch = buffer<Element>(apart);
                        if (!scratch) {
#pragma omp atomic write
                          enough = false;
                          return;
                        }
                        sum_squares(dtype, grid, b, begin, end, positions, grain_ids, grains + b * grid.cells(), slots,
                                    rows, scratch.get(), out);
                      });
    if (!enough) code = VQFAST_OUT_OF_MEMORY;
    // Tokens of no image.
    const int64_t first = B ? token_bound(cu_seqlens, 0, T) : 0, last = B ? token_bound(cu_seqlens, B, T) : 0;
    std::memset((void *)out, 0, first * D * sizeof(Element));
    std::memset((void *)(out + last * D), 0, (T - last) * D * sizeof(Element));
  });
  return known ? code : (int)VQFAST_BAD_DTYPE;
}
