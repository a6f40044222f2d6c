#include "diffusion_loss.cuh"

#include "runtime.h"

using namespace vqfast;

extern "C" int vqfast_cuda_diffusion_loss(vqfast_dtype dtype, const void *logits, const int64_t *x0, const int64_t *x_t,
                                          const int64_t *t, const int64_t *s, vqfast_levels levels, int64_t B,
                                          int64_t L, int64_t K, const double *scale, int marginal, double aux_weight,
                                          void *loss, void *grad, int device, void *stream) {
  if (K > kMaxCodes) return VQFAST_CUDA_ERROR + (int)cudaErrorInvalidValue;
  Launcher launch(device, stream);
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    typedef accumulate_t<T> R;
    if (B * L == 0) return;
    const bool vectors = K % kVector<T> == 0 && aligned(logits) && aligned(grad);
    const LaunchPlan plan = softmax_plan(B * L, K, vectors ? kVector<T> : 1, sizeof(R), launch.limits());
    const LossArguments<T> args = {static_cast<const T *>(logits),
                                   x0,
                                   x_t,
                                   t,
                                   s,
                                   levels,
                                   B * L,
                                   L,
                                   (int)K,
                                   scale,
                                   marginal != 0,
                                   aux_weight,
                                   static_cast<R *>(loss),
                                   static_cast<T *>(grad),
                                   plan.shared_bytes > 0};
    launch(vectors ? diffusion_loss_rows<T, kVector<T>> : diffusion_loss_rows<T, 1>, plan, args);
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}

extern "C" int vqfast_cuda_scale_rows(vqfast_dtype dtype, void *rows, int64_t R, int64_t K, const void *scale,
                                      int64_t stride, int device, void *stream) {
  Launcher launch(device, stream);
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    if (R * K == 0) return;
    const bool vectors = K % kVector<T> == 0 && aligned(rows);
    launch(vectors ? scale_rows<T, kVector<T>> : scale_rows<T, 1>, scale_rows_plan(R, launch.limits()),
           static_cast<T *>(rows), R, K, static_cast<const accumulate_t<T> *>(scale), stride);
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}
