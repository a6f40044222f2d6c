#include "matrix_step.cuh"

#include <algorithm>
#include <limits>

#include "runtime.h"

using namespace vqfast;

namespace {

// Calls body(std::integral_constant) with the plan's rows of a tile.
template <typename Body>
void with_rows(int tile_rows, Body body) {
  switch (tile_rows) {
    case 16:
      return body(std::integral_constant<int, 16>());
    case 8:
      return body(std::integral_constant<int, 8>());
    default:
      return body(std::integral_constant<int, 4>());
  }
}

}  // namespace

extern "C" int vqfast_cuda_matrix_loss(vqfast_dtype dtype, const void *logits, const int64_t *x0, const int64_t *x_t,
                                       const int64_t *s, vqfast_step step, int64_t B, int64_t L, int64_t K,
                                       const double *scale, int marginal, double aux_weight, void *loss, void *grad,
                                       int device, void *stream) {
  if (K > kMostStepCodes) return VQFAST_CUDA_ERROR + (int)cudaErrorInvalidValue;
  Launcher launch(device, stream);
  const bool known_dtype = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    if (B * L == 0) return;
    const StepPlan plan = step_plan(B, L, K, launch.limits());
    const MatrixLossArguments<T> args = {
        {static_cast<const T *>(logits), x_t, s, step, B, L, plan.tiles_a_sample, (int)K, marginal != 0},
        x0,
        scale,
        aux_weight,
        static_cast<accumulate_t<T> *>(loss),
        static_cast<T *>(grad)};
    with_rows(plan.tile_rows,
              [&](auto rows) { launch(matrix_loss_tiles<T, decltype(rows)::value>, plan.launch, args); });
  });
  return known_dtype ? launch.code() : (int)VQFAST_BAD_DTYPE;
}

extern "C" int vqfast_cuda_matrix_sample(vqfast_dtype dtype, const void *logits, const void *unconditional,
                                         const int64_t *x_t, const int64_t *s, vqfast_step step, int64_t B, int64_t L,
                                         int64_t K, const int64_t *known, int marginal, double temperature,
                                         double guidance, int64_t top_k, double top_p, const int64_t *key, int64_t *x_s,
                                         int device, void *stream) {
  if (K > kMostStepCodes) return VQFAST_CUDA_ERROR + (int)cudaErrorInvalidValue;
  Launcher launch(device, stream);
  const bool known_dtype = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    if (B * L == 0) return;
    const StepPlan plan = step_plan(B, L, K, launch.limits());
    const double factor = std::min(1 / temperature, std::numeric_limits<double>::max());
    const MatrixSampleArguments<T> args = {
        {static_cast<const T *>(logits), x_t, s, step, B, L, plan.tiles_a_sample, (int)K, marginal != 0},
        static_cast<const T *>(unconditional),
        known,
        factor,
        guidance,
        {top_k, top_p},
        key,
        x_s};
    with_rows(plan.tile_rows,
              [&](auto rows) { launch(matrix_sample_tiles<T, decltype(rows)::value>, plan.launch, args); });
  });
  return known_dtype ? launch.code() : (int)VQFAST_BAD_DTYPE;
}
