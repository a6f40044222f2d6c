// vqfast._cuda: the CUDA launchers as Python functions of raw pointers. Imports on machines without a driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.attr("targets") = VQFAST_CUDA_TARGETS;
  m.def("error_string", [](int code) { return std::string(cudaGetErrorString(cudaError_t(code))); });
}
