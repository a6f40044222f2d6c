#include "sampling.cuh"

#include <algorithm>
#include <limits>

#include "runtime.h"

using namespace vqfast;

extern "C" int vqfast_cuda_q_sample(const int64_t *x0, const int64_t *t, vqfast_levels levels, int64_t B, int64_t L,
                                    int64_t K, const int64_t *key, int64_t *x_t, int device, void *stream) {
  Launcher launch(device, stream);
  const int64_t tokens = B * L;
  if (tokens > 0) launch(q_sample_tokens, tokens_plan(tokens, launch.limits()), x0, t, levels, tokens, L, K, key, x_t);
  return launch.code();
}

extern "C" int vqfast_cuda_p_sample(vqfast_dtype dtype, const void *logits, const void *unconditional,
                                    const int64_t *x_t, const int64_t *t, const int64_t *s, vqfast_levels levels,
                                    int64_t B, int64_t L, int64_t K, const int64_t *known, int marginal,
                                    double temperature, double guidance, int64_t top_k, double top_p,
                                    const int64_t *key, int64_t *x_s, int device, void *stream) {
  if (K > kMaxCodes) return VQFAST_CUDA_ERROR + (int)cudaErrorInvalidValue;
  Launcher launch(device, stream);
  const bool known_dtype = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    typedef accumulate_t<T> R;
    if (B * L == 0) return;
    const bool vectors = K % kVector<T> == 0 && aligned(logits) && aligned(unconditional);
    const LaunchPlan plan = softmax_plan(B * L, K, vectors ? kVector<T> : 1, sizeof(R), launch.limits());
    // Neither 0 nor infinite: a product of the two is NaN, where a score equals the largest or is -inf.
    typedef std::numeric_limits<R> Range;
    const R inverse = (R)std::clamp(1 / temperature, (double)Range::min(), (double)Range::max());
    const SampleArguments<T> args = {static_cast<const T *>(logits),
                                     static_cast<const T *>(unconditional),
                                     x_t,
                                     t,
                                     s,
                                     levels,
                                     B * L,
                                     L,
                                     (int)K,
                                     known,
                                     marginal != 0,
                                     inverse,
                                     (R)guidance,
                                     {top_k, top_p},
                                     key,
                                     x_s,
                                     plan.shared_bytes > 0};
    launch(vectors ? p_sample_rows<T, kVector<T>> : p_sample_rows<T, 1>, plan, args);
  });
  return known_dtype ? launch.code() : (int)VQFAST_BAD_DTYPE;
}
