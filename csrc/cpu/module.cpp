// skd._cpu: pointers, shapes and strides in, numbers out. No PyTorch header, so one build serves every PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <utility>

#include "common/bind_fourier.h"
#include "common/bind_layers.h"
#include "cpu/channel_histogram.h"
#include "cpu/instruction_sets.h"
#include "cpu/operations.h"
#include "cpu/pytorch_threads.h"

namespace py = pybind11;

PYBIND11_MODULE(_cpu, m) {
  using namespace skd;
  const char* wanted = std::getenv("SKD_CPU_ISA");
  use_instruction_set(wanted == nullptr ? "" : wanted);

  m.doc() = "Kernels for CPUs. Tensors cross as address, dtype code, shape and strides (in elements).";
  m.def("instruction_set", [] { return instruction_set_in_use().name; }, "The instruction set in use.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"), "Use this one from now on.");
  py::list names;
  for (const InstructionSet& each : supported_instruction_sets()) names.append(each.name);
  m.attr("supported_instruction_sets") = names;

  m.def("shares_threads", &pytorch_has_threads, "Whether calls run on PyTorch's threads, or on some of their own.");

  bind_layers(m);
  bind_fourier_layers(m);

  m.def(
      "set_stream_above",
      [](int64_t bytes) {
        std::swap(bytes, stream_above);
        return bytes;
      },
      py::arg("bytes"),
      "Calls that move more bytes write gradients past the caches; returns what held before. For tests.");
  m.def("spectral_align", &spectral_align, py::arg("layers"), py::arg("threads"), py::arg("out"),
        py::arg("out_is_double"), py::arg("reduce"), py::call_guard<py::gil_scoped_release>(),
        "Losses are written to the address `out`, gradients where the layers say.");
  m.def("fourier_align", &fourier_align, py::arg("layers"), py::arg("threads"), py::arg("out"),
        py::arg("out_is_double"), py::call_guard<py::gil_scoped_release>(),
        "Losses are written to the address `out`, gradients and spectra where the layers say.");
  m.def(
      "spectral_intensity",
      // The map in pieces: this is called for a single small result, and a Python object would take as long as the
      // rest.
      [](uintptr_t data, int dtype, std::array<int64_t, 4> shape, std::array<int64_t, 4> stride, int axis, double scale,
         uintptr_t out, bool per_image, int threads) {
        const Map map = make_map(data, dtype, shape, stride);
        spectral_intensity({map, Axis(axis), scale, reinterpret_cast<char*>(out)}, per_image, threads);
      },
      py::arg("data"), py::arg("dtype"), py::arg("shape"), py::arg("stride"), py::arg("axis"), py::arg("scale"),
      py::arg("out"), py::arg("per_image"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
      "Scaled magnitudes of a Map, averaged, are written to `out`.");
  m.def(
      "count_channels",
      [](const Map& map, uintptr_t offset, uintptr_t scale, int64_t bins, int threads, uintptr_t holding) {
        count_channels({map, reinterpret_cast<const double*>(offset), reinterpret_cast<const double*>(scale), bins},
                       threads, reinterpret_cast<int64_t*>(holding));
      },
      py::arg("map"), py::arg("offset"), py::arg("scale"), py::arg("bins"), py::arg("threads"), py::arg("holding"),
      py::call_guard<py::gil_scoped_release>(),
      "Histograms of every position's channels, as channel_histogram.h says.");
}
