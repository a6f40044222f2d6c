#include "lookup.cuh"

#include "runtime.h"

using namespace vqfast;

extern "C" int vqfast_cuda_lookup(vqfast_dtype dtype, vqfast_rows x, int64_t D, const void *codebook, int64_t K,
                                  const int64_t *indices, void *quantized, void *error, int64_t *counts, int device,
                                  void *stream) {
  Launcher launch(device, stream);
  const int64_t N = x.batch * x.rows;
  launch.zero(counts, K * (int64_t)sizeof *counts);
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    if (N == 0) return;
    const bool vectors = vectors_of_16_bytes<T>(x, D) && aligned(codebook) && aligned(quantized);
    launch(vectors ? lookup_rows<T> : lookup_tiles<T>, lookup_plan(N, vectors, launch.limits()), x, N, D,
           static_cast<const T *>(codebook), K, indices, static_cast<T *>(quantized),
           static_cast<accumulate_t<T> *>(error), counts);
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}

extern "C" int vqfast_cuda_lookup_backward(vqfast_dtype dtype, vqfast_rows grad_quantized, const void *grad_error,
                                           vqfast_rows x, int64_t D, const void *codebook, int64_t K,
                                           const int64_t *indices, void *grad_x, int device, void *stream) {
  Launcher launch(device, stream);
  const int64_t N = x.batch * x.rows;
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    if (N == 0) return;
    const bool vectors = vectors_of_16_bytes<T>(x, D) && vectors_of_16_bytes<T>(grad_quantized, D) &&
                         aligned(codebook) && aligned(grad_x);
    launch(vectors ? lookup_backward_rows<T> : lookup_backward_tiles<T>, lookup_plan(N, vectors, launch.limits()),
           grad_quantized, static_cast<const accumulate_t<T> *>(grad_error), x, N, D, static_cast<const T *>(codebook),
           K, indices, static_cast<T *>(grad_x));
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}
