#include "codebook_stats.cuh"

#include "runtime.h"

namespace vqfast {
namespace {

template <typename T>
struct StatsMemory {
  int *table, *totals, *starts, *order;
  accumulate_t<T> *partial;
  int64_t bytes;

  StatsMemory(const StatsPlan &plan, int64_t N, int64_t D, int64_t K, void *base) {
    Scratch scratch(base);
    table = scratch.take<int>(K * plan.chunks);
    totals = scratch.take<int>(K);
    starts = scratch.take<int>(K + 1);
    order = scratch.take<int>(N);
    partial = scratch.take<accumulate_t<T>>(plan.pieces * 2 * (D + 1));
    bytes = scratch.bytes();
  }
};

template <typename T>
void stats(Launcher &launch, const Columns<T> &columns, int64_t N, const int64_t *indices, int64_t K, void *scratch) {
  const StatsPlan plan = stats_plan(N, K);
  const StatsMemory<T> memory(plan, N, columns.D, K, scratch);
  const LaunchPlan chunks = each_plan(plan.chunks, kPlaceThreads / 32, kPlaceThreads);
  launch.zero(memory.table, K * plan.chunks * (int64_t)sizeof(int));
  launch(stats_count, chunks, indices, N, K, plan.chunks, plan.rows_per_chunk, memory.table);
  launch(stats_scan_chunks, each_plan(K, 8, 256), K, plan.chunks, memory.table, memory.totals);
  launch(stats_scan_codes, LaunchPlan{1, 1, kScanThreads, 0}, K, memory.totals, memory.starts);
  launch(stats_place, chunks, indices, N, K, plan.chunks, plan.rows_per_chunk, memory.starts, memory.table,
         memory.order);
  launch(stats_sum<T>, stats_sum_plan(plan, columns.D + 1, launch.limits()), columns, indices, K, memory.starts,
         memory.order, memory.partial);
  launch(stats_finish<T>, tokens_plan(K * (columns.D + 1), launch.limits()), columns, K, memory.starts, memory.partial);
}

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cuda_codebook_stats_scratch(vqfast_dtype dtype, int64_t N, int64_t D, int64_t K, int64_t *bytes) {
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    *bytes = StatsMemory<T>(stats_plan(N, K), N, D, K, nullptr).bytes;
  });
  return known ? (int)VQFAST_OK : (int)VQFAST_BAD_DTYPE;
}

extern "C" int vqfast_cuda_codebook_stats(vqfast_dtype dtype, vqfast_rows x, int64_t D, const int64_t *indices,
                                          const void *weights, int64_t K, void *counts, void *sums, void *scratch,
                                          int device, void *stream) {
  const int64_t N = x.batch * x.rows;
  if (N > 0x7fffffff - kPiece || K > kMaxCodes) return VQFAST_CUDA_ERROR + (int)cudaErrorInvalidValue;
  Launcher launch(device, stream);
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    typedef accumulate_t<T> R;
    const Columns<T> columns = {x, static_cast<const R *>(weights), D, static_cast<R *>(counts),
                                static_cast<R *>(sums)};
    stats(launch, columns, N, indices, K, scratch);
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}
