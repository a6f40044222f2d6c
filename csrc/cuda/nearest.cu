#include "nearest_decide.cuh"

#include "runtime.h"

namespace vqfast {
namespace {

struct SearchMemory {
  SearchState *state;
  CentredCodes codes;
  Leaders leaders;
  OpenRows open;
  Nearest *nearest;
  int64_t bytes;

  SearchMemory(const SearchPlan &plan, int64_t N, int64_t D, int64_t K, void *base) {
    Scratch scratch(base);
    state = scratch.take<SearchState>(1);
    codes.centre = scratch.take<float>(D);
    codes.factors = scratch.take<double>(K);
    codes.codes = scratch.take<float>(plan.padded_features * plan.padded_codes);
    codes.bias = scratch.take<float>(plan.padded_codes);
    codes.pitch = plan.padded_codes;
    leaders.best = scratch.take<float>(plan.splits * N);
    leaders.second = scratch.take<float>(plan.splits * N);
    leaders.code = scratch.take<int>(plan.splits * N);
    leaders.squared_norm = scratch.take<float>(N);
    open.row = scratch.take<int64_t>(N);
    open.threshold = scratch.take<double>(N);
    nearest = scratch.take<Nearest>(N + 2 * plan.exact_blocks);
    bytes = scratch.bytes();
  }
};

// One head.
template <typename T>
void nearest(Launcher &launch, vqfast_metric metric, int exact, const Rows<T> &x, int64_t N, int64_t D,
             const T *codebook, int64_t K, void *scratch, Found found, int64_t *reranked) {
  const DeviceLimits &limits = launch.limits();
  const SearchPlan plan = search_plan(N, D, K, limits);
  const SearchMemory memory(plan, N, D, K, scratch);
  const LaunchPlan exact_plan = {(unsigned)plan.exact_blocks, 1, kSearchThreads, 0};
  launch.zero(memory.state, sizeof *memory.state);
  launch(nearest_centre<T>, each_plan(D, 32, 256), metric, codebook, K, D, memory.codes.centre, memory.state);
  if (metric != VQFAST_L2) launch(nearest_row_size<T>, each_plan(1, 1, 256), x, N, D, memory.state);
  if (metric == VQFAST_COSINE)
    launch(nearest_factors<T>, items_plan(K, 8, 256, limits), codebook, K, D, memory.codes.factors);
  launch(nearest_codes<T>, each_plan(plan.padded_codes, 32, 256), metric, codebook, K, D, plan.padded_features,
         memory.codes, memory.state);
  launch(x.stride_feature == 1 ? nearest_scores<T, false> : nearest_scores<T, true>, search_scores_plan(plan, limits),
         metric, x, N, (int)D, memory.codes, memory.state, plan.row_tiles, (int)plan.code_tiles,
         (int)plan.tiles_per_split, memory.leaders);
  launch(nearest_certify, tokens_plan(N, limits), exact, N, D, plan.splits, memory.leaders, memory.state, memory.open,
         found);
  launch(nearest_exact<T>, exact_plan, metric, x, D, codebook, K, memory.codes, memory.state, memory.open,
         memory.nearest);
  launch(nearest_decide, items_plan(at_most(N, 1 << 16), 256, 256, limits), metric, K, plan.exact_blocks, memory.state,
         memory.open, memory.nearest, found, reranked);
}

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cuda_nearest_scratch(int64_t N, int64_t D, int64_t K, int device, int64_t *bytes) {
  Launcher launch(device, nullptr);
  *bytes = launch.ok() && N > 0 ? SearchMemory(search_plan(N, D, K, launch.limits()), N, D, K, nullptr).bytes : 0;
  return launch.code();
}

extern "C" int vqfast_cuda_nearest(vqfast_dtype dtype, vqfast_metric metric, int exact, vqfast_rows x, int64_t heads,
                                   int64_t stride_head, int64_t D, const void *codebook, int64_t K, const uint8_t *mask,
                                   const void *, int64_t *indices, int64_t *reranked, void *scratch, int device,
                                   void *stream) {
  if (K > kMaxCodes) return VQFAST_CUDA_ERROR + (int)cudaErrorInvalidValue;
  Launcher launch(device, stream);
  const int64_t N = x.batch * x.rows;
  if (reranked) launch.zero(reranked, sizeof *reranked);
  if (N == 0) return launch.code();
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    for (int64_t h = 0; h < heads; ++h) {
      vqfast_rows rows = x;
      rows.data = static_cast<const T *>(x.data) + h * stride_head;
      nearest<T>(launch, metric, exact, rows, N, D, static_cast<const T *>(codebook) + h * K * D, K, scratch,
                 {indices + h, mask ? mask + h : nullptr, heads}, reranked);
    }
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}
