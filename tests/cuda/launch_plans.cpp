// The launch plans of csrc/cuda/launch.h for ctypes, and the choice that nearest_path.h makes by them.
#include "launch.h"
#include "nearest_path.h"

using namespace vqfast;

namespace {

DeviceLimits limits(const int64_t *device) { return {(int)device[0], (int)device[1], (int)device[2], (int)device[3]}; }

void write(const LaunchPlan &plan, int64_t *out) {
  out[0] = plan.grid_x;
  out[1] = plan.grid_y;
  out[2] = plan.threads;
  out[3] = plan.shared_bytes;
}

}  // namespace

extern "C" {

void search(int64_t N, int64_t D, int64_t K, const int64_t *device, int64_t *out) {
  const SearchPlan plan = search_plan(N, D, K, limits(device));
  write(search_scores_plan(plan, limits(device)), out);
  const int64_t rest[] = {plan.row_tiles,    plan.code_tiles,      plan.parts.splits, plan.parts.tiles_per_split,
                          plan.padded_codes, plan.padded_features, plan.exact_blocks};
  for (int i = 0; i < 7; ++i) out[4 + i] = rest[i];
}

void tensor(int64_t N, int64_t D, int64_t K, const int64_t *device, int64_t *out) {
  const TensorPlan plan = tensor_plan(N, D, K, limits(device));
  write(tensor_scores_plan(plan, at_most(N, plan.chunk)), out);
  const int64_t rest[] = {plan.stages,     plan.pitch,        plan.chunk,
                          plan.code_tiles, plan.parts.splits, plan.parts.tiles_per_split};
  for (int i = 0; i < 6; ++i) out[4 + i] = rest[i];
}

void hopper(int64_t N, int64_t D, int64_t K, const int64_t *device, int64_t *out) {
  const HopperPlan plan = hopper_plan(N, D, K, limits(device));
  if (plan.groups > 0) write(hopper_scores_plan(plan, at_most(N, plan.chunk), limits(device)), out);
  const int64_t rest[] = {plan.groups,
                          plan.panel,
                          plan.panels,
                          plan.stages,
                          plan.with_bias,
                          plan.chunk,
                          plan.room,
                          plan.tile_codes,
                          plan.code_tiles,
                          plan.parts.splits,
                          plan.parts.tiles_per_split};
  for (int i = 0; i < 11; ++i) out[4 + i] = rest[i];
}

// A device of which nothing was measured but four sizes with 64 features, and those with more than fit its tensor
// cores.
constexpr PathsLine kLines[] = {
    {"sm_80", {"float32", "bfloat16"}, 0, 0, 0, {}},
    {nullptr, {}, 64, 64, 64, {2, 1}},
    {"sm_90", {"float32", "bfloat16", "hopper"}, 0, 0, 0, {}},
    {nullptr, {}, 64, 64, 64, {1, 2, 3}},
    {nullptr, {}, 64, 4096, 64, {3, 1, 2}},
    {nullptr, {}, 4096, 4096, 64, {3, 2, 1}},
    {nullptr, {}, 4096, 64, 64, {3, 2, 0}},  // Hopper's was wrong
    {nullptr, {}, 4096, 4096, 1024, {3, 2, 1}},
    {nullptr, {}, 0, 0, 0, {}},
};

// out[0]: 1, 2 or 3 for scores in float32, bfloat16 or by warpgroups; `wanted` is one of them, or 0.
void scores(int64_t N, int64_t D, int64_t K, int64_t wanted, int64_t hopper_built, const int64_t *device,
            int64_t *out) {
  const DeviceLimits own = limits(device);
  const MeasuredShapes shapes(("sm_" + std::to_string(own.capability)).c_str(), kLines);
  out[0] = (int64_t)choose_scores((Scores)wanted, N, K, D, tensor_plan(N, D, K, own), hopper_plan(N, D, K, own),
                                  hopper_built != 0, shapes);
}

void softmax(int64_t rows, int64_t K, int64_t vector, int64_t bytes, const int64_t *device, int64_t *out) {
  write(softmax_plan(rows, K, (int)vector, bytes, limits(device)), out);
}

void lookup(int64_t N, int64_t vectors, const int64_t *device, int64_t *out) {
  write(lookup_plan(N, vectors != 0, limits(device)), out);
}

void stats(int64_t N, int64_t K, int64_t columns, const int64_t *device, int64_t *out) {
  const StatsPlan plan = stats_plan(N, K);
  write(stats_sum_plan(plan, columns, limits(device)), out);
  out[4] = plan.chunks;
  out[5] = plan.rows_per_chunk;
  out[6] = plan.pieces;
}

void tokens(int64_t count, const int64_t *device, int64_t *out) { write(tokens_plan(count, limits(device)), out); }

void scale_rows(int64_t rows, const int64_t *device, int64_t *out) {
  write(scale_rows_plan(rows, limits(device)), out);
}
}
