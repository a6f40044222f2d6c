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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("isa", [] { return vqfast::kernels().name; });
  m.def("isa_error", [] { return vqfast::isa_error(); });
  m.def("nearest", &nearest);
}
