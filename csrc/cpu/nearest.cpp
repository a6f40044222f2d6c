// Exact nearest-code search.
#include "nearest_search.h"

namespace vqfast {
namespace {

// Those of N rows that a mask lets through, in their order.
class Taken {
 public:
  // mask: may be null; from one row to the next `step` further in it.
  Taken(const uint8_t *mask, int64_t step, int64_t N) : count_(N) {
    if (!mask) return;
    numbers_ = buffer<int64_t>(N);
    ready_ = numbers_ != nullptr;
    if (!ready_) return;
    count_ = 0;
    for (int64_t n = 0; n < N; ++n) {
      numbers_[count_] = n;
      count_ += mask[n * step] != 0;
    }
  }
  bool ready() const { return ready_; }
  int64_t count() const { return count_; }
  int64_t operator[](int64_t i) const { return numbers_ ? numbers_[i] : i; }

 private:
  Buffer<int64_t> numbers_;  // null where all are taken
  int64_t count_;
  bool ready_ = true;
};

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_nearest(vqfast_dtype dtype, vqfast_metric metric, int exact, vqfast_rows x, int64_t heads,
                                  int64_t stride_head, int64_t D, const void *codebook, int64_t K, const uint8_t *mask,
                                  const void *prepared, int64_t *indices, int64_t *reranked) {
  if (dtype < VQFAST_F32 || dtype > VQFAST_F16) return VQFAST_BAD_DTYPE;
  int64_t total = 0;
  if (reranked) *reranked = 0;
  if (x.batch * x.rows == 0) return VQFAST_OK;
  SearchPath path;
  const int engine = prepared ? ((const CodebookFacts *)prepared)->engine : kAnyEngine;
  if (!choose_path(x.batch * x.rows, K, D, engine, path)) return VQFAST_BAD_SCORES;
  const int64_t bytes = Codes::bytes(K, D, path), size = element_size(dtype);
  const Buffer<char> own = prepared ? nullptr : buffer<char>(bytes);
  if (!prepared && !own) return VQFAST_OUT_OF_MEMORY;
  for (int64_t h = 0; h < heads; ++h) {
    // Only `prepare` writes to this memory.
    char *memory = prepared ? (char *)const_cast<void *>(prepared) + h * bytes : own.get();
    const Codes codes(dtype, metric, (const char *)codebook + h * K * D * size, K, D, path, memory);
    if (!prepared && !codes.prepare()) return VQFAST_OUT_OF_MEMORY;
    vqfast_rows rows = x;
    rows.data = (const char *)x.data + h * stride_head * size;
    const Taken taken(mask ? mask + h : nullptr, heads, x.batch * x.rows);
    if (!taken.ready()) return VQFAST_OUT_OF_MEMORY;
    if (mask)
      for (int64_t n = 0; n < x.batch * x.rows; ++n) indices[n * heads + h] = -1;
    const Search search(codes, exact != 0, {dtype, rows, indices + h, heads});
    const auto chunk = [&](Scratch &m, int64_t first, int64_t n) {
      m.rows.clear();
      for (int64_t i = first; i < first + n; ++i) m.rows.push_back(taken[i]);
      const int64_t open = search.run(m);
#pragma omp atomic
      total += open;
    };
    const int64_t N = taken.count();
    if (!in_chunks(codes, search.stride(), N, N * K * D > kParallelProducts, chunk)) return VQFAST_OUT_OF_MEMORY;
  }
  if (reranked) *reranked = total;
  return VQFAST_OK;
}
