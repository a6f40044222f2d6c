#include "nearest_choose.cuh"
#include "nearest_hopper.h"
#include "nearest_packing.cuh"
#include "nearest_path.h"
#include "nearest_tensor.cuh"

namespace vqfast {
namespace {

struct SearchMemory {
  SearchPlan plan;
  TensorPlan tensor;
  HopperPlan hopper;
  Scores scores;
  SearchState *state;
  CentredCodes codes;
  Leaders leaders = {};
  int64_t chunk = 0, splits = 0;  // rows that tensor cores score at a time, parts of the codebook
  TensorFacts *facts = nullptr;
  PackedVectors rows = {}, packed = {};
  float *reach = nullptr;
  KeptCandidates kept = {};
  OpenRows open;
  Nearest *nearest;
  int64_t bytes;

  SearchMemory(Scores wanted, int64_t N, int64_t D, int64_t K, const DeviceLimits &limits, void *base)
      : plan(search_plan(N, D, K, limits)),
        tensor(tensor_plan(N, D, K, limits)),
        hopper(hopper_plan(N, D, K, limits)),
        scores(choose_scores(wanted, N, K, D, tensor, hopper, kHopperBuilt, measured_shapes(limits.capability))) {
    Scratch scratch(base);
    state = scratch.take<SearchState>(1);
    codes.centre = scratch.take<float>(D);
    codes.row_centre = scratch.take<float>(D);
    codes.factors = scratch.take<double>(K);
    codes.codes = scratch.take<float>(plan.padded_features * plan.padded_codes);
    codes.bias = scratch.take<float>(plan.padded_codes);
    codes.pitch = plan.padded_codes;
    if (scores == Scores::float32) {
      leaders.best = scratch.take<float>(plan.parts.splits * N);
      leaders.second = scratch.take<float>(plan.parts.splits * N);
      leaders.code = scratch.take<int>(plan.parts.splits * N);
      leaders.squared_norm = scratch.take<float>(N);
    } else {
      const bool panels = scores == Scores::hopper;
      chunk = panels ? hopper.chunk : tensor.chunk;
      splits = panels ? hopper.parts.splits : tensor.parts.splits;
      const auto vectors = [&](int64_t count) {
        const int pitch = panels ? hopper.panels << (hopper.panel - 1) : tensor.pitch;
        return PackedVectors{scratch.take<bf16>(count * pitch), pitch, panels ? hopper.panel : 0, count,
                             panels && hopper.with_bias};
      };
      facts = scratch.take<TensorFacts>(1);
      packed = vectors(plan.padded_codes);
      rows = vectors(panels ? hopper.room : chunk);
      reach = scratch.take<float>(chunk);
      kept = {scratch.take<float>(splits * chunk), scratch.take<int>(splits * chunk),
              scratch.take<Candidate>(splits * chunk * kKept)};
    }
    open.row = scratch.take<int64_t>(N);
    open.threshold = scratch.take<double>(N);
    nearest = scratch.take<Nearest>(N + 2 * plan.exact_blocks);
    bytes = scratch.bytes();
  }
};

// Every row's index, or the row among the open ones: scores in float32.
template <typename T>
void by_float32(Launcher &launch, const SearchMemory &memory, vqfast_metric metric, int exact, const Rows<T> &x,
                int64_t N, int64_t D, Found found) {
  const SearchPlan &plan = memory.plan;
  launch(x.stride_feature == 1 ? nearest_scores<T, false> : nearest_scores<T, true>,
         search_scores_plan(plan, launch.limits()), metric, x, N, (int)D, memory.codes, memory.state, plan.row_tiles,
         (int)plan.code_tiles, (int)plan.parts.tiles_per_split, memory.leaders);
  launch(nearest_certify, tokens_plan(N, launch.limits()), metric, exact, N, D, plan.parts.splits, memory.leaders,
         memory.state, memory.open, found);
}

// The same, scores by tensor cores.
template <typename T>
void by_tensor_cores(Launcher &launch, const SearchMemory &memory, vqfast_metric metric, int exact, const Rows<T> &x,
                     int64_t N, int64_t D, const T *codebook, Found found, int64_t *reranked) {
  const DeviceLimits &limits = launch.limits();
  launch.zero(memory.facts, sizeof *memory.facts);
  launch(nearest_tensor_codes<T>, each_plan(memory.plan.padded_codes, 8, 256), metric, codebook, D,
         memory.plan.padded_codes, memory.codes, memory.packed, memory.state, memory.facts);
  for (int64_t first = 0; first < N; first += memory.chunk) {
    const int64_t n = at_most(memory.chunk, N - first);
    launch(nearest_tensor_rows<T>, items_plan(n, 8, 256, limits), metric, exact, x, first, n, D, memory.codes,
           memory.state, memory.facts, memory.rows, memory.reach);
    if constexpr (kHopperBuilt)
      if (memory.scores == Scores::hopper)
        launch_hopper_scores(launch, memory.hopper, memory.rows, n, memory.packed, memory.codes.bias, memory.reach,
                             memory.kept);
    if (memory.scores == Scores::bfloat16)
      launch(memory.tensor.stages == 3 ? nearest_tensor_scores<3> : nearest_tensor_scores<2>,
             tensor_scores_plan(memory.tensor, n), memory.rows, n, memory.packed, memory.codes.bias, memory.reach,
             (int)memory.tensor.code_tiles, (int)memory.tensor.parts.tiles_per_split, memory.kept);
    launch(nearest_choose<T>, items_plan(n, 8, 256, limits), metric, exact, x, first, n, D, codebook, memory.splits,
           memory.kept, memory.reach, memory.state, memory.open, found, reranked);
  }
}

// One head.
template <typename T>
void nearest(Launcher &launch, Scores wanted, vqfast_metric metric, int exact, const Rows<T> &x, int64_t N, int64_t D,
             const T *codebook, int64_t K, void *scratch, Found found, int64_t *reranked) {
  const DeviceLimits &limits = launch.limits();
  const SearchMemory memory(wanted, N, D, K, limits, scratch);
  const SearchPlan &plan = memory.plan;
  const LaunchPlan exact_plan = {(unsigned)plan.exact_blocks, 1, kSearchThreads, 0};
  launch.zero(memory.state, sizeof *memory.state);
  if (metric != VQFAST_L2) launch(nearest_row_size<T>, each_plan(1, 1, 256), x, N, D, memory.state);
  if (metric == VQFAST_COSINE)
    launch(nearest_factors<T>, items_plan(K, 8, 256, limits), codebook, K, D, memory.codes.factors, memory.state);
  launch(nearest_centre<T>, each_plan(D, 32, 256), metric, codebook, K, D, memory.codes, memory.state);
  launch(nearest_codes<T>, each_plan(plan.padded_codes, 32, 256), metric, codebook, K, D, plan.padded_features,
         memory.codes, memory.state);
  if (memory.scores != Scores::float32)
    by_tensor_cores<T>(launch, memory, metric, exact, x, N, D, codebook, found, reranked);
  else
    by_float32<T>(launch, memory, metric, exact, x, N, D, found);
  launch(nearest_exact<T>, exact_plan, metric, x, D, codebook, K, memory.codes, memory.state, memory.open,
         memory.nearest);
  launch(nearest_decide, items_plan(at_most(N, 1 << 16), 256, 256, limits), metric, K, plan.exact_blocks, memory.state,
         memory.open, memory.nearest, found, exact ? reranked : nullptr);
}

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cuda_nearest_scratch(int64_t N, int64_t D, int64_t K, int device, int64_t *bytes) {
  Scores wanted;
  if (!read_scores(wanted)) return VQFAST_BAD_SCORES;
  Launcher launch(device, nullptr);
  *bytes = launch.ok() && N > 0 ? SearchMemory(wanted, N, D, K, launch.limits(), nullptr).bytes : 0;
  return launch.code();
}

extern "C" int vqfast_cuda_nearest(vqfast_dtype dtype, vqfast_metric metric, int exact, vqfast_rows x, int64_t heads,
                                   int64_t stride_head, int64_t D, const void *codebook, int64_t K, const uint8_t *mask,
                                   const void *, int64_t *indices, int64_t *reranked, void *scratch, int device,
                                   void *stream) {
  if (K > kMaxCodes) return VQFAST_CUDA_ERROR + (int)cudaErrorInvalidValue;
  Scores wanted;
  if (!read_scores(wanted)) return VQFAST_BAD_SCORES;
  Launcher launch(device, stream);
  const int64_t N = x.batch * x.rows;
  if (reranked) launch.zero(reranked, sizeof *reranked);
  if (N == 0) return launch.code();
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    for (int64_t h = 0; h < heads; ++h) {
      vqfast_rows rows = x;
      rows.data = static_cast<const T *>(x.data) + h * stride_head;
      nearest<T>(launch, wanted, metric, exact, rows, N, D, static_cast<const T *>(codebook) + h * K * D, K, scratch,
                 {indices + h, mask ? mask + h : nullptr, heads}, reranked);
    }
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}
