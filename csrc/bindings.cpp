// The Python side of the compiled library: what it was built with. Importing it registers the CPU operators.
#include <pybind11/pybind11.h>

#include "cpu/levels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of constrained_ops.";
  m.def("simd", [] { return constrained_ops::loops().name; }, "The instruction set whose loops run.");
  m.attr("build") = py::dict(py::arg("torch") = CO_TORCH_VERSION, py::arg("compiler") = CO_COMPILER,
                             py::arg("cuda") = CO_CUDA_VERSION, py::arg("cuda_architectures") = CO_CUDA_ARCHITECTURES,
                             py::arg("cuda_left_out") = CO_CUDA_LEFT_OUT);
}
