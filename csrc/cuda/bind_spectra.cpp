#include "cuda/bind_spectra.h"

#include <pybind11/stl.h>

#include <vector>

#include "common/bind_fourier.h"
#include "common/intensity_map.h"
#include "cuda/fourier_align.h"
#include "cuda/launch.h"
#include "cuda/spectral_intensity.h"

namespace py = pybind11;

namespace skd {
namespace {

class FourierCall {
 public:
  explicit FourierCall(const std::vector<FourierArguments>& layers) : plan_(plan_fourier(layers)) {}

  int64_t workspace_doubles() const { return plan_.workspace_doubles(); }
  std::vector<const char*> paths() const { return plan_.paths; }
  size_t launches() const { return plan_.launches.size() + 1; }

  void launch(uintptr_t losses, uintptr_t workspace, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    plan_.place(reinterpret_cast<double*>(workspace));
    run_fourier(plan_, reinterpret_cast<float*>(losses), reinterpret_cast<cudaStream_t>(stream));
  }

 private:
  FourierPlan plan_;
};

class IntensityCall {
 public:
  IntensityCall(const Map& map, int axis, double scale, uintptr_t out) : over_channels_(Axis(axis) == Axis::channel) {
    float* const to = reinterpret_cast<float*>(out);
    if (over_channels_) {
      channels_ = plan_channel_intensity(map, to, scale);
    } else {
      space_ = plan_space_intensity(map, to, scale);
    }
  }

  int64_t workspace_doubles() const {
    return over_channels_ ? channels_.workspace_doubles() : space_.workspace_doubles();
  }
  const char* path() const {
    if (!over_channels_) return space_.paths[0];
    return channels_.slot > 0 ? "global" : channels_.in_pieces ? "pieces" : "numbers";
  }

  void launch(uintptr_t workspace, int device, uintptr_t stream_address) {
    const DeviceGuard guard(device);
    const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_address);
    double* const memory = reinterpret_cast<double*>(workspace);
    if (over_channels_) {
      channels_.place(memory);
      run_channel_intensity(channels_, stream);
    } else {
      space_.place(memory);
      run_fourier(space_, nullptr, stream);
    }
  }

 private:
  bool over_channels_;
  ChannelIntensity channels_{};
  FourierPlan space_{};
};

}  // namespace

void bind_spectra(py::module_& m) {
  bind_fourier_layers(m);
  py::class_<FourierCall>(m, "FourierPlan", py::module_local(), "The launches of one call of fourier_align.")
      .def(py::init<const std::vector<FourierArguments>&>(), py::arg("layers"))
      .def_property_readonly("workspace_doubles", &FourierCall::workspace_doubles, "Memory that launch() needs.")
      .def_property_readonly("paths", &FourierCall::paths, "Per layer \"tile\" or \"general\".")
      .def_property_readonly("launches", &FourierCall::launches, "How many kernels launch() starts.")
      .def("launch", &FourierCall::launch, py::arg("losses"), py::arg("workspace"), py::arg("device"),
           py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
           "Starts the kernels; losses, gradients and spectra are there when the stream has done them.");
  py::class_<IntensityCall>(m, "IntensityPlan", py::module_local(), "The launches of one call of spectral_intensity.")
      .def(py::init<const Map&, int, double, uintptr_t>(), py::arg("map"), py::arg("axis"), py::arg("scale"),
           py::arg("out"))
      .def_property_readonly("workspace_doubles", &IntensityCall::workspace_doubles, "Memory that launch() needs.")
      .def_property_readonly("path", &IntensityCall::path,
                             "\"tile\" or \"general\" over space; \"pieces\", \"numbers\" or \"global\" over channels.")
      .def("launch", &IntensityCall::launch, py::arg("workspace"), py::arg("device"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>(), "Starts the kernels.");
}

}  // namespace skd
