// The Python class FourierLayer; each extension has its own, beside Map (bind_layers.h).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "common/fourier_layer.h"

namespace skd {

inline void bind_fourier_layers(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<FourierArguments>(m, "FourierLayer", py::module_local())
      .def(py::init([](const Map& student, const Map& teacher, std::optional<Map> gradient, uintptr_t bands,
                       uintptr_t spectra, int compare, double focal, double inner_weight, double loss_scale,
                       double gradient_scale) {
             const Map none{nullptr, student.dtype, {}, {}};
             return FourierArguments{student,
                                     teacher,
                                     gradient.value_or(none),
                                     reinterpret_cast<const char*>(bands),
                                     reinterpret_cast<char*>(spectra),
                                     Compare(compare),
                                     focal,
                                     inner_weight,
                                     loss_scale,
                                     gradient_scale};
           }),
           py::arg("student"), py::arg("teacher"), py::arg("gradient"), py::arg("bands"), py::arg("spectra"),
           py::arg("compare"), py::arg("focal"), py::arg("inner_weight"), py::arg("loss_scale"),
           py::arg("gradient_scale"));
}

}  // namespace skd
