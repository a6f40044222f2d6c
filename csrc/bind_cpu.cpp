// vqfast._cpu: the CPU launchers as Python functions of raw pointers. Sizes and dtypes are checked by the caller.
#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "vqfast.h"

namespace py = pybind11;

namespace {

void check(int code) {
  if (code == VQFAST_OUT_OF_MEMORY) throw std::bad_alloc();
  if (code != VQFAST_OK) throw std::runtime_error("vqfast: CPU kernel failed with code " + std::to_string(code));
}

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

// A (batch, rows, D) view: address, batch, rows and three strides in elements, as layout.py gives them.
vqfast_rows rows(const py::tuple &view) {
  return {pointer<const void>(view[0].cast<uintptr_t>()), view[1].cast<int64_t>(), view[2].cast<int64_t>(),
          view[3].cast<int64_t>(),                         view[4].cast<int64_t>(), view[5].cast<int64_t>()};
}

int64_t nearest(int dtype, const py::tuple &x, int64_t D, uintptr_t codebook, int64_t K, uintptr_t indices) {
  const vqfast_rows view = rows(x);
  py::gil_scoped_release release;
  int64_t reranked = 0;
  check(vqfast_cpu_nearest((vqfast_dtype)dtype, view, D, pointer<const void>(codebook), K,
                           pointer<int64_t>(indices), &reranked));
  return reranked;
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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("isa", [] { return vqfast::kernels().name; });
  m.def("isa_error", [] { return vqfast::isa_error(); });
  m.def("nearest", &nearest);
  m.def("lookup", &lookup);
  m.def("lookup_backward", &lookup_backward);
  m.def("codebook_stats", &codebook_stats);
  m.def("q_sample", &q_sample);
  m.def("diffusion_loss", &diffusion_loss);
  m.def("scale_rows", &scale_rows, py::call_guard<py::gil_scoped_release>());
  m.def("p_sample", &p_sample);
}
