// vqfast._cuda: the CUDA launchers as Python functions of raw pointers. Sizes and dtypes are checked by the caller.
// It imports on machines without a driver; devices() says then what is missing.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdlib.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "vqfast.h"

namespace py = pybind11;

namespace {

std::string error_string(int code) {
  if (code < VQFAST_CUDA_ERROR) return "error code " + std::to_string(code);
  return cudaGetErrorString((cudaError_t)(code - VQFAST_CUDA_ERROR));
}

void check(int code) {
  if (code == VQFAST_BAD_SCORES)
    throw py::value_error(std::string("VQFAST_CUDA_SCORES: expected float32, bfloat16 or hopper, got ") +
                          getenv("VQFAST_CUDA_SCORES"));
  if (code != VQFAST_OK) throw std::runtime_error("vqfast: CUDA kernel failed: " + error_string(code));
}

// "sm_90" of each device.
std::vector<std::string> devices() {
  const auto ask = [](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  };
  int count = 0;
  ask(cudaGetDeviceCount(&count));
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) {
    int major = 0, minor = 0;
    ask(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i));
    ask(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i));
    names.push_back("sm_" + std::to_string(major) + std::to_string(minor));
  }
  return names;
}

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

// A (batch, rows, D) view: address, batch, rows and three strides in elements, as layout.py gives them.
vqfast_rows rows(const py::tuple &view) {
  return {pointer<const void>(view[0].cast<uintptr_t>()),
          view[1].cast<int64_t>(),
          view[2].cast<int64_t>(),
          view[3].cast<int64_t>(),
          view[4].cast<int64_t>(),
          view[5].cast<int64_t>()};
}

int64_t nearest_scratch(int64_t N, int64_t D, int64_t K, int device) {
  int64_t bytes = 0;
  check(vqfast_cuda_nearest_scratch(N, D, K, device, &bytes));
  return bytes;
}

void nearest(int dtype, int metric, bool exact, const py::tuple &x, int64_t heads, int64_t stride_head, int64_t D,
             uintptr_t codebook, int64_t K, uintptr_t mask, uintptr_t prepared, uintptr_t indices, uintptr_t reranked,
             uintptr_t scratch, int device, uintptr_t stream) {
  check(vqfast_cuda_nearest((vqfast_dtype)dtype, (vqfast_metric)metric, exact, rows(x), heads, stride_head, D,
                            pointer<const void>(codebook), K, pointer<const uint8_t>(mask),
                            pointer<const void>(prepared), pointer<int64_t>(indices), pointer<int64_t>(reranked),
                            pointer<void>(scratch), device, pointer<void>(stream)));
}

void lookup(int dtype, const py::tuple &x, int64_t D, uintptr_t codebook, int64_t K, uintptr_t indices,
            uintptr_t quantized, uintptr_t error, uintptr_t counts, int device, uintptr_t stream) {
  check(vqfast_cuda_lookup((vqfast_dtype)dtype, rows(x), D, pointer<const void>(codebook), K,
                           pointer<const int64_t>(indices), pointer<void>(quantized), pointer<void>(error),
                           pointer<int64_t>(counts), device, pointer<void>(stream)));
}

void lookup_backward(int dtype, const py::tuple &grad_quantized, uintptr_t grad_error, const py::tuple &x, int64_t D,
                     uintptr_t codebook, int64_t K, uintptr_t indices, uintptr_t grad_x, int device, uintptr_t stream) {
  check(vqfast_cuda_lookup_backward((vqfast_dtype)dtype, rows(grad_quantized), pointer<const void>(grad_error), rows(x),
                                    D, pointer<const void>(codebook), K, pointer<const int64_t>(indices),
                                    pointer<void>(grad_x), device, pointer<void>(stream)));
}

int64_t codebook_stats_scratch(int dtype, int64_t N, int64_t D, int64_t K) {
  int64_t bytes = 0;
  check(vqfast_cuda_codebook_stats_scratch((vqfast_dtype)dtype, N, D, K, &bytes));
  return bytes;
}

void codebook_stats(int dtype, const py::tuple &x, int64_t D, uintptr_t indices, uintptr_t weights, int64_t K,
                    uintptr_t counts, uintptr_t sums, uintptr_t scratch, int device, uintptr_t stream) {
  check(vqfast_cuda_codebook_stats((vqfast_dtype)dtype, rows(x), D, pointer<const int64_t>(indices),
                                   pointer<const void>(weights), K, pointer<void>(counts), pointer<void>(sums),
                                   pointer<void>(scratch), device, pointer<void>(stream)));
}

// A family's tables: address of the levels, T, columns, addresses of the noise and of its running sum, or 0.
vqfast_levels levels_of(const py::tuple &tables) {
  return {pointer<const double>(tables[0].cast<uintptr_t>()), tables[1].cast<int64_t>(), tables[2].cast<int64_t>(),
          pointer<const double>(tables[3].cast<uintptr_t>()), pointer<const double>(tables[4].cast<uintptr_t>())};
}

void q_sample(uintptr_t x0, uintptr_t t, const py::tuple &tables, int64_t B, int64_t L, int64_t K, uintptr_t key,
              uintptr_t x_t, int device, uintptr_t stream) {
  const vqfast_levels levels = levels_of(tables);
  check(vqfast_cuda_q_sample(pointer<const int64_t>(x0), pointer<const int64_t>(t), levels, B, L, K,
                             pointer<const int64_t>(key), pointer<int64_t>(x_t), device, pointer<void>(stream)));
}

void posterior(int dtype, uintptr_t logits, uintptr_t x_t, uintptr_t t, uintptr_t s, const py::tuple &tables, int64_t B,
               int64_t L, int64_t K, bool marginal, uintptr_t log_p, int device, uintptr_t stream) {
  const vqfast_levels levels = levels_of(tables);
  check(vqfast_cuda_posterior((vqfast_dtype)dtype, pointer<const void>(logits), pointer<const int64_t>(x_t),
                              pointer<const int64_t>(t), pointer<const int64_t>(s), levels, B, L, K, marginal,
                              pointer<void>(log_p), device, pointer<void>(stream)));
}

void posterior_backward(int dtype, uintptr_t grad, uintptr_t logits, uintptr_t x_t, uintptr_t t, uintptr_t s,
                        const py::tuple &tables, int64_t B, int64_t L, int64_t K, bool marginal, uintptr_t grad_logits,
                        int device, uintptr_t stream) {
  const vqfast_levels levels = levels_of(tables);
  check(vqfast_cuda_posterior_backward((vqfast_dtype)dtype, pointer<const void>(grad), pointer<const void>(logits),
                                       pointer<const int64_t>(x_t), pointer<const int64_t>(t),
                                       pointer<const int64_t>(s), levels, B, L, K, marginal, pointer<void>(grad_logits),
                                       device, pointer<void>(stream)));
}

void diffusion_loss(int dtype, uintptr_t logits, uintptr_t x0, uintptr_t x_t, uintptr_t t, uintptr_t s,
                    const py::tuple &tables, int64_t B, int64_t L, int64_t K, uintptr_t scale, bool marginal,
                    double aux_weight, uintptr_t loss, uintptr_t grad, int device, uintptr_t stream) {
  const vqfast_levels levels = levels_of(tables);
  check(vqfast_cuda_diffusion_loss((vqfast_dtype)dtype, pointer<const void>(logits), pointer<const int64_t>(x0),
                                   pointer<const int64_t>(x_t), pointer<const int64_t>(t), pointer<const int64_t>(s),
                                   levels, B, L, K, pointer<const double>(scale), marginal, aux_weight,
                                   pointer<void>(loss), pointer<void>(grad), device, pointer<void>(stream)));
}

void scale_rows(int dtype, uintptr_t rows, int64_t R, int64_t K, uintptr_t scale, int64_t stride, int device,
                uintptr_t stream) {
  check(vqfast_cuda_scale_rows((vqfast_dtype)dtype, pointer<void>(rows), R, K, pointer<const void>(scale), stride,
                               device, pointer<void>(stream)));
}

void p_sample(int dtype, uintptr_t logits, uintptr_t unconditional, uintptr_t x_t, uintptr_t t, uintptr_t s,
              const py::tuple &tables, int64_t B, int64_t L, int64_t K, uintptr_t known, bool marginal,
              double temperature, double guidance, int64_t top_k, double top_p, uintptr_t key, uintptr_t x_s,
              int device, uintptr_t stream) {
  const vqfast_levels levels = levels_of(tables);
  check(vqfast_cuda_p_sample((vqfast_dtype)dtype, pointer<const void>(logits), pointer<const void>(unconditional),
                             pointer<const int64_t>(x_t), pointer<const int64_t>(t), pointer<const int64_t>(s), levels,
                             B, L, K, pointer<const int64_t>(known), marginal, temperature, guidance, top_k, top_p,
                             pointer<const int64_t>(key), pointer<int64_t>(x_s), device, pointer<void>(stream)));
}

// Addresses of the prior, the likelihood and the transposed prior or 0; elements from a sample's matrix to the next.
vqfast_step step_of(const py::tuple &matrices) {
  return {pointer<const double>(matrices[0].cast<uintptr_t>()), pointer<const double>(matrices[1].cast<uintptr_t>()),
          pointer<const double>(matrices[2].cast<uintptr_t>()), matrices[3].cast<int64_t>(),
          matrices[4].cast<int64_t>()};
}

void matrix_loss(int dtype, uintptr_t logits, uintptr_t x0, uintptr_t x_t, uintptr_t s, const py::tuple &matrices,
                 int64_t B, int64_t L, int64_t K, uintptr_t scale, bool marginal, double aux_weight, uintptr_t loss,
                 uintptr_t grad, int device, uintptr_t stream) {
  const vqfast_step step = step_of(matrices);
  check(vqfast_cuda_matrix_loss((vqfast_dtype)dtype, pointer<const void>(logits), pointer<const int64_t>(x0),
                                pointer<const int64_t>(x_t), pointer<const int64_t>(s), step, B, L, K,
                                pointer<const double>(scale), marginal, aux_weight, pointer<void>(loss),
                                pointer<void>(grad), device, pointer<void>(stream)));
}

void matrix_sample(int dtype, uintptr_t logits, uintptr_t unconditional, uintptr_t x_t, uintptr_t s,
                   const py::tuple &matrices, int64_t B, int64_t L, int64_t K, uintptr_t known, bool marginal,
                   double temperature, double guidance, int64_t top_k, double top_p, uintptr_t key, uintptr_t x_s,
                   int device, uintptr_t stream) {
  const vqfast_step step = step_of(matrices);
  check(vqfast_cuda_matrix_sample((vqfast_dtype)dtype, pointer<const void>(logits), pointer<const void>(unconditional),
                                  pointer<const int64_t>(x_t), pointer<const int64_t>(s), step, B, L, K,
                                  pointer<const int64_t>(known), marginal, temperature, guidance, top_k, top_p,
                                  pointer<const int64_t>(key), pointer<int64_t>(x_s), device, pointer<void>(stream)));
}

void pack(int64_t element_bytes, const py::tuple &values, int64_t D, uintptr_t grains, int64_t B, int64_t Hc,
          int64_t Wc, int64_t num_grains, bool region, int64_t capacity, uintptr_t packed, uintptr_t cu_seqlens,
          uintptr_t positions, uintptr_t grain_ids, uintptr_t scratch, int device, uintptr_t stream) {
  const vqfast_rows view = rows(values);
  check(vqfast_cuda_pack(element_bytes, view, D, pointer<const int64_t>(grains), B, Hc, Wc, num_grains, region,
                         capacity, pointer<void>(packed), pointer<int32_t>(cu_seqlens), pointer<int64_t>(positions),
                         pointer<int64_t>(grain_ids), pointer<void>(scratch), device, pointer<void>(stream)));
}

void unpack(int64_t element_bytes, const py::tuple &packed, int64_t D, uintptr_t cu_seqlens, uintptr_t positions,
            uintptr_t grain_ids, uintptr_t grains, int64_t B, int64_t Hc, int64_t Wc, int64_t num_grains,
            bool replicate, uintptr_t grid, uintptr_t scratch, int device, uintptr_t stream) {
  const vqfast_rows view = rows(packed);
  check(vqfast_cuda_unpack(element_bytes, view, D, pointer<const int32_t>(cu_seqlens),
                           pointer<const int64_t>(positions), pointer<const int64_t>(grain_ids),
                           pointer<const int64_t>(grains), B, Hc, Wc, num_grains, replicate, pointer<void>(grid),
                           pointer<void>(scratch), device, pointer<void>(stream)));
}

void unpack_backward(int dtype, const py::tuple &grad, int64_t D, uintptr_t cu_seqlens, uintptr_t positions,
                     uintptr_t grain_ids, int64_t T, uintptr_t grains, int64_t B, int64_t Hc, int64_t Wc,
                     int64_t num_grains, uintptr_t grad_packed, uintptr_t scratch, int device, uintptr_t stream) {
  const vqfast_rows view = rows(grad);
  check(vqfast_cuda_unpack_backward((vqfast_dtype)dtype, view, D, pointer<const int32_t>(cu_seqlens),
                                    pointer<const int64_t>(positions), pointer<const int64_t>(grain_ids), T,
                                    pointer<const int64_t>(grains), B, Hc, Wc, num_grains, pointer<void>(grad_packed),
                                    pointer<void>(scratch), device, pointer<void>(stream)));
}

void position_mask(uintptr_t positions, uintptr_t grain_ids, uintptr_t grain, int64_t B, int64_t L, int64_t Hc,
                   int64_t Wc, int64_t num_grains, int64_t V, uintptr_t mask, int device, uintptr_t stream) {
  check(vqfast_cuda_position_mask(pointer<const int64_t>(positions), pointer<const int64_t>(grain_ids),
                                  pointer<const int64_t>(grain), B, L, Hc, Wc, num_grains, V, pointer<uint8_t>(mask),
                                  device, pointer<void>(stream)));
}

void grain_entropy(int dtype, uintptr_t images, const std::array<int64_t, 4> &shape,
                   const std::array<int64_t, 4> &strides, int64_t P, int64_t bins, double sigma, double lowest,
                   double highest, uintptr_t entropy, int device, uintptr_t stream) {
  check(vqfast_cuda_grain_entropy((vqfast_dtype)dtype, pointer<const void>(images), shape[0], shape[1], shape[2],
                                  shape[3], strides.data(), P, bins, sigma, lowest, highest, pointer<void>(entropy),
                                  device, pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("targets") = VQFAST_CUDA_TARGETS;
  m.def("devices", &devices);
  m.def("error_string", &error_string);
  m.def("nearest_scratch", &nearest_scratch);
  m.def("nearest", &nearest);
  m.def("lookup", &lookup);
  m.def("lookup_backward", &lookup_backward);
  m.def("codebook_stats_scratch", &codebook_stats_scratch);
  m.def("codebook_stats", &codebook_stats);
  m.def("q_sample", &q_sample);
  m.def("posterior", &posterior);
  m.def("posterior_backward", &posterior_backward);
  m.def("diffusion_loss", &diffusion_loss);
  m.def("scale_rows", &scale_rows);
  m.def("p_sample", &p_sample);
  m.def("matrix_loss", &matrix_loss);
  m.def("matrix_sample", &matrix_sample);
  m.def("pack", &pack);
  m.def("unpack", &unpack);
  m.def("unpack_backward", &unpack_backward);
  m.def("position_mask", &position_mask);
  m.def("grain_entropy", &grain_entropy);
}
