// The Python classes Map and AlignLayer; each extension has its own.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>

#include "common/align_layer.h"

namespace skd {

inline Map make_map(uintptr_t data, int dtype, const std::array<int64_t, 4>& shape,
                    const std::array<int64_t, 4>& stride) {
  Map map{reinterpret_cast<char*>(data), DType(dtype), {}, {}};
  std::copy(shape.begin(), shape.end(), map.shape);
  std::copy(stride.begin(), stride.end(), map.stride);
  return map;
}

inline void bind_layers(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Map>(m, "Map", py::module_local())
      .def(py::init(&make_map), py::arg("data"), py::arg("dtype"), py::arg("shape"), py::arg("stride"));

  py::class_<AlignArguments>(m, "AlignLayer", py::module_local())
      .def(py::init([](const Map& student, const Map& teacher, std::optional<Map> gradient, double row_weight,
                       double loss_scale, double gradient_scale) {
             const Map none{nullptr, student.dtype, {}, {}};
             return AlignArguments{student, teacher, gradient.value_or(none), row_weight, loss_scale, gradient_scale};
           }),
           py::arg("student"), py::arg("teacher"), py::arg("gradient"), py::arg("row_weight"), py::arg("loss_scale"),
           py::arg("gradient_scale"));
}

}  // namespace skd
