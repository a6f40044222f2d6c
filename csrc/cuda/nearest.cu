#include "nearest.cuh"

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

  SearchMemory(const SearchPlan &plan, int64_t N, int64_t D, void *base) {
    Scratch scratch(base);
    state = scratch.take<SearchState>(1);
    codes.centre = scratch.take<float>(D);
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

template <typename T>
void nearest(Launcher &launch, const Rows<T> &x, int64_t N, int64_t D, const T *codebook, int64_t K, void *scratch,
             int64_t *indices, int64_t *reranked) {
  const DeviceLimits &limits = launch.limits();
  const SearchPlan plan = search_plan(N, D, K, limits);
  const SearchMemory memory(plan, N, D, scratch);
  const LaunchPlan exact = {(unsigned)plan.exact_blocks, 1, kSearchThreads, 0};
  launch(nearest_centre<T>, each_plan(D, 32, 256), codebook, K, D, memory.codes.centre, memory.state);
  launch(nearest_codes<T>, each_plan(plan.padded_codes, 32, 256), codebook, K, D, plan.padded_features, memory.codes,
         memory.state);
  launch(x.stride_feature == 1 ? nearest_scores<T, false> : nearest_scores<T, true>, search_scores_plan(plan, limits),
         x, N, (int)D, memory.codes, plan.row_tiles, (int)plan.code_tiles, (int)plan.tiles_per_split, memory.leaders);
  launch(nearest_certify, tokens_plan(N, limits), N, D, plan.splits, memory.leaders, memory.state, memory.open,
         indices);
  launch(nearest_exact<T>, exact, x, D, codebook, K, memory.codes, memory.state, memory.open, memory.nearest);
  launch(nearest_decide, items_plan(at_most(N, 1 << 16), 256, 256, limits), K, plan.exact_blocks, memory.state,
         memory.open, memory.nearest, indices, reranked);
}

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cuda_nearest_scratch(int64_t N, int64_t D, int64_t K, int device, int64_t *bytes) {
  Launcher launch(device, nullptr);
  *bytes = launch.ok() && N > 0 ? SearchMemory(search_plan(N, D, K, launch.limits()), N, D, nullptr).bytes : 0;
  return launch.code();
}

extern "C" int vqfast_cuda_nearest(vqfast_dtype dtype, vqfast_rows x, int64_t D, const void *codebook, int64_t K,
                                   int64_t *indices, int64_t *reranked, void *scratch, int device, void *stream) {
  if (K > kMaxCodes) return VQFAST_CUDA_ERROR + (int)cudaErrorInvalidValue;
  Launcher launch(device, stream);
  const int64_t N = x.batch * x.rows;
  if (N == 0) {
    if (reranked) launch.zero(reranked, sizeof *reranked);
    return launch.code();
  }
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    nearest<T>(launch, x, N, D, static_cast<const T *>(codebook), K, scratch, indices, reranked);
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}
