// Residual quantisation: each stage's search of what the stages before it have left of a chunk of rows, which stays in
// cache until the last stage is through.
#include <cstring>

#include "nearest_search.h"

namespace vqfast {
namespace {

// A thread's residuals and sums, of a chunk of rows each.
template <class T>
struct Residuals {
  Buffer<T> left;
  T *sum;  // where the result goes
  int64_t D;

  void begin(const Rows &rows, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const T *row = (const T *)rows.row(first + i);
      for (int64_t d = 0; d < D; ++d) left[i * D + d] = row[d * rows.x.stride_feature];
    }
    std::memset((void *)sum, 0, n * D * sizeof(T));
  }
  // Both rounded to the dtype, stage by stage, as if they were tensors.
  void move(int64_t i, const T *__restrict code) {
    T *__restrict rest = left.get() + i * D;
    T *__restrict total = sum + i * D;
    for (int64_t d = 0; d < D; ++d) {
      narrow(widen(rest[d]) - widen(code[d]), rest[d]);
      narrow(widen(total[d]) + widen(code[d]), total[d]);
    }
  }
};

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_residual_nearest(vqfast_dtype dtype, vqfast_rows x, int64_t D, const void *codebooks,
                                           int64_t Q, int64_t stride_stage, int64_t K, const uint8_t *mask,
                                           int64_t *indices, void *quantized) {
  const int64_t N = x.batch * x.rows, size = element_size(dtype);
  if (N == 0) return VQFAST_OK;
  SearchPath path;
  if (!choose_path(N, K, D, kAnyEngine, path)) return VQFAST_BAD_SCORES;
  const int64_t bytes = Codes::bytes(K, D, path);
  // Stages of one codebook share what is prepared of it.
  const int64_t own = stride_stage == 0 ? 1 : Q;
  const Buffer<char> memory = buffer<char>(own * bytes);
  if (!memory) return VQFAST_OUT_OF_MEMORY;
  std::vector<Codes> stages;
  try {
    for (int64_t q = 0; q < own; ++q)
      stages.emplace_back(dtype, VQFAST_L2, (const char *)codebooks + q * stride_stage * size, K, D,
                          path, memory.get() + q * bytes);
  } catch (const std::bad_alloc &) {
    return VQFAST_OUT_OF_MEMORY;
  }
  for (const Codes &codes : stages)
    if (!codes.prepare()) return VQFAST_OUT_OF_MEMORY;
  const Rows rows = {dtype, x, indices, Q};
  bool enough = true;
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_const_t<std::remove_pointer_t<decltype(type)>> T;
    const auto chunk = [&](Scratch &m, int64_t first, int64_t n) {
      Residuals<T> residuals = {buffer<T>(n * D), (T *)quantized + first * D, D};
      if (!residuals.left) throw std::bad_alloc();
      residuals.begin(rows, first, n);
      m.rows.clear();
      for (int64_t i = 0; i < n; ++i)
        if (!mask || mask[first + i])
          m.rows.push_back(i);
        else
          std::fill_n(indices + (first + i) * Q, Q, -1);
      const vqfast_rows left = {residuals.left.get(), 1, n, 0, D, 1};
      for (int64_t q = 0; q < Q; ++q) {
        const Codes &codes = stages[q % own];
        int64_t *chosen = indices + first * Q + q;
        Search(codes, true, {dtype, left, chosen, Q}).run(m);
        for (const int64_t i : m.rows) residuals.move(i, (const T *)codes.code(chosen[i * Q]));
      }
    };
    const int64_t stride = Search(stages[0], true, rows).stride();
    enough = in_chunks(stages[0], stride, N, N * K * D * Q > kParallelProducts, chunk);
  });
  if (!known) return VQFAST_BAD_DTYPE;
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}
