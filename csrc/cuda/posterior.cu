#include "posterior.cuh"

#include "runtime.h"

using namespace vqfast;

namespace {

template <typename T>
PosteriorArguments<T> arguments_of(const void *logits, const int64_t *x_t, const int64_t *t, const int64_t *s,
                                   const vqfast_levels &levels, int64_t B, int64_t L, int64_t K, int marginal,
                                   const LaunchPlan &plan) {
  return {static_cast<const T *>(logits), x_t, t, s, levels, B * L, L, (int)K, marginal != 0, plan.shared_bytes > 0};
}

// Rows of K + 1 values with a mask state, which start anywhere, are gone through value by value.
template <typename T>
bool in_vectors(const vqfast_levels &levels, int64_t K) {
  return levels.columns == 1 && K % kVector<T> == 0;
}

}  // namespace

extern "C" int vqfast_cuda_posterior(vqfast_dtype dtype, const void *logits, const int64_t *x_t, const int64_t *t,
                                     const int64_t *s, vqfast_levels levels, int64_t B, int64_t L, int64_t K,
                                     int marginal, void *log_p, int device, void *stream) {
  if (K > kMaxCodes) return VQFAST_CUDA_ERROR + (int)cudaErrorInvalidValue;
  Launcher launch(device, stream);
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    if (B * L == 0) return;
    const bool vectors = in_vectors<T>(levels, K) && aligned(logits) && aligned(log_p);
    const LaunchPlan plan = softmax_plan(B * L, K, vectors ? kVector<T> : 1, sizeof(accumulate_t<T>), launch.limits());
    launch(vectors ? posterior_rows<T, kVector<T>> : posterior_rows<T, 1>, plan,
           arguments_of<T>(logits, x_t, t, s, levels, B, L, K, marginal, plan), static_cast<T *>(log_p));
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}

extern "C" int vqfast_cuda_posterior_backward(vqfast_dtype dtype, const void *grad, const void *logits,
                                              const int64_t *x_t, const int64_t *t, const int64_t *s,
                                              vqfast_levels levels, int64_t B, int64_t L, int64_t K, int marginal,
                                              void *grad_logits, int device, void *stream) {
  if (K > kMaxCodes) return VQFAST_CUDA_ERROR + (int)cudaErrorInvalidValue;
  Launcher launch(device, stream);
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    if (B * L == 0) return;
    const bool vectors = in_vectors<T>(levels, K) && aligned(grad) && aligned(logits) && aligned(grad_logits);
    const LaunchPlan plan = softmax_plan(B * L, K, vectors ? kVector<T> : 1, sizeof(accumulate_t<T>), launch.limits());
    launch(vectors ? posterior_backward_rows<T, kVector<T>> : posterior_backward_rows<T, 1>, plan,
           arguments_of<T>(logits, x_t, t, s, levels, B, L, K, marginal, plan), static_cast<const T *>(grad),
           static_cast<T *>(grad_logits));
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}
