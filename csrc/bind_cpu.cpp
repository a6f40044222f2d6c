// vqfast._cpu: the CPU launchers as Python functions of raw pointers. Sizes and dtypes are checked by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/nearest_path.h"
#include "vqfast.h"

namespace py = pybind11;

namespace {

void check(int code) {
  if (code == VQFAST_OUT_OF_MEMORY) throw std::bad_alloc();
  // IndexError: the caller knows the arguments' names.
  if (code == VQFAST_OUT_OF_RANGE) throw std::out_of_range("vqfast: a value is out of range");
  if (code == VQFAST_BAD_SCORES) {
    std::string names;
    for (const std::string &name : vqfast::path_names()) names += (names.empty() ? "" : ", ") + name;
    throw py::value_error("VQFAST_CPU_SCORES: expected one of " + names + ", got " + std::getenv("VQFAST_CPU_SCORES"));
  }
  if (code != VQFAST_OK) throw std::runtime_error("vqfast: CPU kernel failed with code " + std::to_string(code));
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

int64_t nearest(int dtype, int metric, bool exact, const py::tuple &x, int64_t heads, int64_t stride_head, int64_t D,
                uintptr_t codebook, int64_t K, uintptr_t mask, uintptr_t prepared, uintptr_t indices) {
  const vqfast_rows view = rows(x);
  py::gil_scoped_release release;
  int64_t reranked = 0;
  check(vqfast_cpu_nearest((vqfast_dtype)dtype, (vqfast_metric)metric, exact, view, heads, stride_head, D,
                           pointer<const void>(codebook), K, pointer<const uint8_t>(mask),
                           pointer<const void>(prepared), pointer<int64_t>(indices), &reranked));
  return reranked;
}

// The path of a search whose codebook is not prepared.
std::string nearest_path(int64_t N, int64_t K, int64_t D) {
  vqfast::SearchPath path;
  if (!vqfast::choose_path(N, K, D, vqfast::kAnyEngine, path)) check(VQFAST_BAD_SCORES);
  return vqfast::choose_unfused(N, K, D) ? vqfast::kUnfused : vqfast::path_name(path);
}

int64_t nearest_prepare_bytes(int64_t heads, int64_t D, int64_t K) {
  const int64_t bytes = vqfast_cpu_nearest_prepare_bytes(heads, D, K);
  if (bytes == 0) check(VQFAST_BAD_SCORES);
  return bytes;
}

void nearest_prepare(int dtype, int metric, int64_t heads, int64_t D, uintptr_t codebook, int64_t K,
                     uintptr_t prepared) {
  check(vqfast_cpu_nearest_prepare((vqfast_dtype)dtype, (vqfast_metric)metric, heads, D, pointer<const void>(codebook),
                                   K, pointer<void>(prepared)));
}

void residual_nearest(int dtype, const py::tuple &x, int64_t D, uintptr_t codebooks, int64_t Q, int64_t stride_stage,
                      int64_t K, uintptr_t mask, uintptr_t indices, uintptr_t quantized) {
  const vqfast_rows view = rows(x);
  py::gil_scoped_release release;
  check(vqfast_cpu_residual_nearest((vqfast_dtype)dtype, view, D, pointer<const void>(codebooks), Q, stride_stage, K,
                                    pointer<const uint8_t>(mask), pointer<int64_t>(indices), pointer<void>(quantized)));
}

void lookup(int dtype, const py::tuple &x, int64_t D, uintptr_t codebook, int64_t K, uintptr_t indices,
            uintptr_t quantized, uintptr_t error, uintptr_t counts) {
  const vqfast_rows view = rows(x);
  py::gil_scoped_release release;
  check(vqfast_cpu_lookup((vqfast_dtype)dtype, view, D, pointer<const void>(codebook), K,
                          pointer<const int64_t>(indices), pointer<void>(quantized), pointer<void>(error),
                          pointer<int64_t>(counts)));
}

void lookup_backward(int dtype, const py::tuple &grad_quantized, uintptr_t grad_error, const py::tuple &x, int64_t D,
                     uintptr_t codebook, int64_t K, uintptr_t indices, uintptr_t grad_x) {
  const vqfast_rows grad_view = rows(grad_quantized), view = rows(x);
  py::gil_scoped_release release;
  check(vqfast_cpu_lookup_backward((vqfast_dtype)dtype, grad_view, pointer<const void>(grad_error), view, D,
                                   pointer<const void>(codebook), K, pointer<const int64_t>(indices),
                                   pointer<void>(grad_x)));
}

void codebook_stats(int dtype, const py::tuple &x, int64_t D, uintptr_t indices, uintptr_t weights, int64_t K,
                    uintptr_t counts, uintptr_t sums) {
  const vqfast_rows view = rows(x);
  py::gil_scoped_release release;
  check(vqfast_cpu_codebook_stats((vqfast_dtype)dtype, view, D, pointer<const int64_t>(indices),
                                  pointer<const void>(weights), K, pointer<void>(counts), pointer<void>(sums)));
}

// A family's tables: address of the levels, T, columns, addresses of the noise and of its running sum, or 0.
vqfast_levels levels_of(const py::tuple &tables) {
  return {pointer<const double>(tables[0].cast<uintptr_t>()), tables[1].cast<int64_t>(), tables[2].cast<int64_t>(),
          pointer<const double>(tables[3].cast<uintptr_t>()), pointer<const double>(tables[4].cast<uintptr_t>())};
}

void q_sample(uintptr_t x0, uintptr_t t, const py::tuple &tables, int64_t B, int64_t L, int64_t K, uintptr_t key,
              uintptr_t x_t) {
  const vqfast_levels levels = levels_of(tables);
  py::gil_scoped_release release;
  check(vqfast_cpu_q_sample(pointer<const int64_t>(x0), pointer<const int64_t>(t), levels, B, L, K,
                            pointer<const int64_t>(key), pointer<int64_t>(x_t)));
}

void posterior(int dtype, uintptr_t logits, uintptr_t x_t, uintptr_t t, uintptr_t s, const py::tuple &tables, int64_t B,
               int64_t L, int64_t K, bool marginal, uintptr_t log_p) {
  const vqfast_levels levels = levels_of(tables);
  py::gil_scoped_release release;
  check(vqfast_cpu_posterior((vqfast_dtype)dtype, pointer<const void>(logits), pointer<const int64_t>(x_t),
                             pointer<const int64_t>(t), pointer<const int64_t>(s), levels, B, L, K, marginal,
                             pointer<void>(log_p)));
}

void posterior_backward(int dtype, uintptr_t grad, uintptr_t logits, uintptr_t x_t, uintptr_t t, uintptr_t s,
                        const py::tuple &tables, int64_t B, int64_t L, int64_t K, bool marginal,
                        uintptr_t grad_logits) {
  const vqfast_levels levels = levels_of(tables);
  py::gil_scoped_release release;
  check(vqfast_cpu_posterior_backward((vqfast_dtype)dtype, pointer<const void>(grad), pointer<const void>(logits),
                                      pointer<const int64_t>(x_t), pointer<const int64_t>(t), pointer<const int64_t>(s),
                                      levels, B, L, K, marginal, pointer<void>(grad_logits)));
}

void diffusion_loss(int dtype, uintptr_t logits, uintptr_t x0, uintptr_t x_t, uintptr_t t, uintptr_t s,
                    const py::tuple &tables, int64_t B, int64_t L, int64_t K, uintptr_t scale, bool marginal,
                    double aux_weight, uintptr_t loss, uintptr_t grad) {
  const vqfast_levels levels = levels_of(tables);
  py::gil_scoped_release release;
  check(vqfast_cpu_diffusion_loss((vqfast_dtype)dtype, pointer<const void>(logits), pointer<const int64_t>(x0),
                                  pointer<const int64_t>(x_t), pointer<const int64_t>(t), pointer<const int64_t>(s),
                                  levels, B, L, K, pointer<const double>(scale), marginal, aux_weight,
                                  pointer<void>(loss), pointer<void>(grad)));
}

void scale_rows(int dtype, uintptr_t rows, int64_t R, int64_t K, uintptr_t scale, int64_t stride) {
  check(vqfast_cpu_scale_rows((vqfast_dtype)dtype, pointer<void>(rows), R, K, pointer<const void>(scale), stride));
}

void p_sample(int dtype, uintptr_t logits, uintptr_t unconditional, uintptr_t x_t, uintptr_t t, uintptr_t s,
              const py::tuple &tables, int64_t B, int64_t L, int64_t K, uintptr_t known, bool marginal,
              double temperature, double guidance, int64_t top_k, double top_p, uintptr_t key, uintptr_t x_s) {
  const vqfast_levels levels = levels_of(tables);
  py::gil_scoped_release release;
  check(vqfast_cpu_p_sample((vqfast_dtype)dtype, pointer<const void>(logits), pointer<const void>(unconditional),
                            pointer<const int64_t>(x_t), pointer<const int64_t>(t), pointer<const int64_t>(s), levels,
                            B, L, K, pointer<const int64_t>(known), marginal, temperature, guidance, top_k, top_p,
                            pointer<const int64_t>(key), pointer<int64_t>(x_s)));
}

void matrix_product(uintptr_t rows, int64_t R, uintptr_t matrix, int64_t K, bool transpose, uintptr_t out) {
  check(vqfast_cpu_matrix_product(pointer<const double>(rows), R, pointer<const double>(matrix), K, transpose,
                                  pointer<double>(out)));
}

// Addresses of the prior, the likelihood and the transposed prior or 0; elements from a sample's matrix to the next.
vqfast_step step_of(const py::tuple &matrices) {
  return {pointer<const double>(matrices[0].cast<uintptr_t>()), pointer<const double>(matrices[1].cast<uintptr_t>()),
          pointer<const double>(matrices[2].cast<uintptr_t>()), matrices[3].cast<int64_t>(),
          matrices[4].cast<int64_t>()};
}

void matrix_loss(int dtype, uintptr_t logits, uintptr_t x0, uintptr_t x_t, uintptr_t s, const py::tuple &matrices,
                 int64_t B, int64_t L, int64_t K, uintptr_t scale, bool marginal, double aux_weight, uintptr_t loss,
                 uintptr_t grad) {
  const vqfast_step step = step_of(matrices);
  py::gil_scoped_release release;
  check(vqfast_cpu_matrix_loss((vqfast_dtype)dtype, pointer<const void>(logits), pointer<const int64_t>(x0),
                               pointer<const int64_t>(x_t), pointer<const int64_t>(s), step, B, L, K,
                               pointer<const double>(scale), marginal, aux_weight, pointer<void>(loss),
                               pointer<void>(grad)));
}

void matrix_sample(int dtype, uintptr_t logits, uintptr_t unconditional, uintptr_t x_t, uintptr_t s,
                   const py::tuple &matrices, int64_t B, int64_t L, int64_t K, uintptr_t known, bool marginal,
                   double temperature, double guidance, int64_t top_k, double top_p, uintptr_t key, uintptr_t x_s) {
  const vqfast_step step = step_of(matrices);
  py::gil_scoped_release release;
  check(vqfast_cpu_matrix_sample((vqfast_dtype)dtype, pointer<const void>(logits), pointer<const void>(unconditional),
                                 pointer<const int64_t>(x_t), pointer<const int64_t>(s), step, B, L, K,
                                 pointer<const int64_t>(known), marginal, temperature, guidance, top_k, top_p,
                                 pointer<const int64_t>(key), pointer<int64_t>(x_s)));
}

void pack(int64_t element_bytes, const py::tuple &values, int64_t D, uintptr_t grains, int64_t B, int64_t Hc,
          int64_t Wc, int64_t num_grains, bool region, int64_t capacity, uintptr_t packed, uintptr_t cu_seqlens,
          uintptr_t positions, uintptr_t grain_ids) {
  const vqfast_rows view = rows(values);
  py::gil_scoped_release release;
  check(vqfast_cpu_pack(element_bytes, view, D, pointer<const int64_t>(grains), B, Hc, Wc, num_grains, region, capacity,
                        pointer<void>(packed), pointer<int32_t>(cu_seqlens), pointer<int64_t>(positions),
                        pointer<int64_t>(grain_ids)));
}

void unpack(int64_t element_bytes, const py::tuple &packed, int64_t D, uintptr_t cu_seqlens, uintptr_t positions,
            uintptr_t grain_ids, uintptr_t grains, int64_t B, int64_t Hc, int64_t Wc, int64_t num_grains,
            bool replicate, uintptr_t grid) {
  const vqfast_rows view = rows(packed);
  py::gil_scoped_release release;
  check(vqfast_cpu_unpack(element_bytes, view, D, pointer<const int32_t>(cu_seqlens), pointer<const int64_t>(positions),
                          pointer<const int64_t>(grain_ids), pointer<const int64_t>(grains), B, Hc, Wc, num_grains,
                          replicate, pointer<void>(grid)));
}

void unpack_backward(int dtype, const py::tuple &grad, int64_t D, uintptr_t cu_seqlens, uintptr_t positions,
                     uintptr_t grain_ids, int64_t T, uintptr_t grains, int64_t B, int64_t Hc, int64_t Wc,
                     int64_t num_grains, uintptr_t grad_packed) {
  const vqfast_rows view = rows(grad);
  py::gil_scoped_release release;
  check(vqfast_cpu_unpack_backward((vqfast_dtype)dtype, view, D, pointer<const int32_t>(cu_seqlens),
                                   pointer<const int64_t>(positions), pointer<const int64_t>(grain_ids), T,
                                   pointer<const int64_t>(grains), B, Hc, Wc, num_grains, pointer<void>(grad_packed)));
}

void dynamic_lookup(int dtype, const py::tuple &features, int64_t D, uintptr_t codebook, int64_t K, uintptr_t indices,
                    uintptr_t grains, int64_t B, int64_t Hc, int64_t Wc, int64_t num_grains, uintptr_t quantized,
                    uintptr_t error, uintptr_t counts) {
  const vqfast_rows view = rows(features);
  py::gil_scoped_release release;
  check(vqfast_cpu_dynamic_lookup((vqfast_dtype)dtype, view, D, pointer<const void>(codebook), K,
                                  pointer<const int64_t>(indices), pointer<const int64_t>(grains), B, Hc, Wc,
                                  num_grains, pointer<void>(quantized), pointer<void>(error),
                                  pointer<int64_t>(counts)));
}

void dynamic_lookup_backward(int dtype, const py::tuple &grad_quantized, uintptr_t grad_error,
                             const py::tuple &features, int64_t D, uintptr_t codebook, uintptr_t indices,
                             uintptr_t grains, int64_t B, int64_t Hc, int64_t Wc, int64_t num_grains,
                             uintptr_t grad_features) {
  const vqfast_rows grad_view = rows(grad_quantized), view = rows(features);
  py::gil_scoped_release release;
  check(vqfast_cpu_dynamic_lookup_backward((vqfast_dtype)dtype, grad_view, pointer<const void>(grad_error), view, D,
                                           pointer<const void>(codebook), pointer<const int64_t>(indices),
                                           pointer<const int64_t>(grains), B, Hc, Wc, num_grains,
                                           pointer<void>(grad_features)));
}

void position_mask(uintptr_t positions, uintptr_t grain_ids, uintptr_t grain, int64_t B, int64_t L, int64_t Hc,
                   int64_t Wc, int64_t num_grains, int64_t V, uintptr_t mask) {
  check(vqfast_cpu_position_mask(pointer<const int64_t>(positions), pointer<const int64_t>(grain_ids),
                                 pointer<const int64_t>(grain), B, L, Hc, Wc, num_grains, V, pointer<uint8_t>(mask)));
}

void grain_entropy(int dtype, uintptr_t images, const std::array<int64_t, 4> &shape,
                   const std::array<int64_t, 4> &strides, int64_t P, int64_t bins, double sigma, double lowest,
                   double highest, uintptr_t entropy) {
  check(vqfast_cpu_grain_entropy((vqfast_dtype)dtype, pointer<const void>(images), shape[0], shape[1], shape[2],
                                 shape[3], strides.data(), P, bins, sigma, lowest, highest, pointer<void>(entropy)));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("isa", [] { return vqfast::kernels().name; });
  m.def("isa_error", [] { return vqfast::isa_error(); });
  m.def("nearest", &nearest);
  m.def("nearest_path", &nearest_path);
  m.def("nearest_paths", &vqfast::path_names);
  m.def("nearest_prepare_bytes", &nearest_prepare_bytes);
  m.def("residual_nearest", &residual_nearest);
  m.def("lookup", &lookup);
  m.def("lookup_backward", &lookup_backward);
  m.def("codebook_stats", &codebook_stats);
  m.def("q_sample", &q_sample);
  m.def("posterior", &posterior);
  m.def("posterior_backward", &posterior_backward);
  m.def("diffusion_loss", &diffusion_loss);
  m.def("scale_rows", &scale_rows, py::call_guard<py::gil_scoped_release>());
  m.def("p_sample", &p_sample);
  m.def("matrix_product", &matrix_product, py::call_guard<py::gil_scoped_release>());
  m.def("matrix_loss", &matrix_loss);
  m.def("matrix_sample", &matrix_sample);
  m.def("nearest_prepare", &nearest_prepare, py::call_guard<py::gil_scoped_release>());
  m.def("pack", &pack);
  m.def("unpack", &unpack);
  m.def("unpack_backward", &unpack_backward);
  m.def("dynamic_lookup", &dynamic_lookup);
  m.def("dynamic_lookup_backward", &dynamic_lookup_backward);
  m.def("position_mask", &position_mask, py::call_guard<py::gil_scoped_release>());
  m.def("grain_entropy", &grain_entropy, py::call_guard<py::gil_scoped_release>());
}
