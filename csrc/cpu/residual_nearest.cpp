// Residual quantisation: each stage's search of what the stages before it have left of a chunk of rows, which stays in
// cache until the last stage is through.
#include <cstring>

#include "nearest_search.h"

namespace vqfast {
namespace {

// Rows first..first+n-1 side by side, `pitch` bytes from one to the next.
void copy_rows(const Rows &rows, int64_t first, int64_t n, int64_t D, int64_t size, int64_t pitch, char *to) {
  const void *vectors[kMostTogether];
  for (int64_t i = 0; i < n; i += kMostTogether) {
    const int64_t count = std::min<int64_t>(kMostTogether, n - i);
    for (int64_t j = 0; j < count; ++j) vectors[j] = rows.row(first + i + j);
    if (rows.x.stride_feature != 1)
      gather(size, vectors, count, D, rows.x.stride_feature, to + i * pitch);
    else
      for (int64_t j = 0; j < count; ++j) std::memcpy(to + (i + j) * pitch, vectors[j], D * size);
  }
}

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_residual_nearest(vqfast_dtype dtype, vqfast_rows x, int64_t D, const void *codebooks,
                                           int64_t Q, int64_t stride_stage, int64_t K, const uint8_t *mask,
                                           int64_t *indices, void *quantized) {
  if (dtype < VQFAST_F32 || dtype > VQFAST_F16) return VQFAST_BAD_DTYPE;
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
      stages.emplace_back(dtype, VQFAST_L2, (const char *)codebooks + q * stride_stage * size, K, D, path,
                          memory.get() + q * bytes);
  } catch (const std::bad_alloc &) {
    return VQFAST_OUT_OF_MEMORY;
  }
  for (const Codes &codes : stages)
    if (!codes.prepare()) return VQFAST_OUT_OF_MEMORY;
  const Rows rows = {dtype, x, indices, Q};
  const int64_t pitch = gathered_pitch(D, size) * size;
  const auto chunk = [&](Scratch &m, int64_t first, int64_t n) {
    const Buffer<char> residuals = buffer<char>(n * pitch);
    if (!residuals) throw std::bad_alloc();
    copy_rows(rows, first, n, D, size, pitch, residuals.get());
    char *sums = (char *)quantized + first * D * size;
    std::memset(sums, 0, n * D * size);
    m.rows.clear();
    for (int64_t i = 0; i < n; ++i)
      if (!mask || mask[first + i])
        m.rows.push_back(i);
      else
        std::fill_n(indices + (first + i) * Q, Q, -1);
    const vqfast_rows left = {residuals.get(), 1, n, 0, pitch / size, 1};
    for (int64_t q = 0; q < Q; ++q) {
      const Codes &codes = stages[q % own];
      int64_t *chosen = indices + first * Q + q;
      Search(codes, true, {dtype, left, chosen, Q}).run(m);
      // As if residuals and sums were tensors: both are rounded stage by stage.
      for (const int64_t i : m.rows)
        codes.isa.move_residual(dtype, codes.code(chosen[i * Q]), D, residuals.get() + i * pitch, sums + i * D * size);
    }
  };
  const int64_t stride = Search(stages[0], true, rows).stride();
  const bool enough = in_chunks(stages[0], stride, N, N * K * D * Q > kParallelProducts, chunk);
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}
