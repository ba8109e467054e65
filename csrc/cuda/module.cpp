// skd._cuda: addresses, shapes and strides in, launches on the caller's stream out. No PyTorch header.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "common/bind_layers.h"
#include "cuda/bind_spectra.h"
#include "cuda/launch.h"
#include "cuda/spectral_align.h"

namespace py = pybind11;

namespace skd {
namespace {

// The ticket of a stream's launches, which follow each other; null if all are taken.
unsigned* ticket_of(int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<int, unsigned*> tickets;
  static std::map<std::pair<int, cudaStream_t>, int> places;
  static std::map<int, int> taken;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = places.find({device, stream});
  const bool several = stream == cudaStreamPerThread;  // one handle for a stream in each host thread
  if (several || (found == places.end() && taken[device] == kStreamTickets)) return nullptr;
  if (tickets.count(device) == 0) tickets[device] = stream_tickets();
  if (found != places.end()) return tickets[device] + found->second;
  return tickets[device] + (places[{device, stream}] = taken[device]++);
}

// A call, cut into launches.
class AlignPlan {
 public:
  AlignPlan(const std::vector<AlignArguments>& layers, bool reduce)
      : launches_(plan_align(layers, reduce)), layers_(layers.size()) {}

  // A ticket for a captured launch, the layers' totals, the blocks' shares.
  int64_t workspace_doubles() const {
    int64_t blocks = 0;
    for (const AlignLaunch& launch : launches_) blocks = std::max<int64_t>(blocks, launch.table.blocks);
    return 1 + int64_t(layers_) + blocks;
  }

  void launch(uintptr_t losses, uintptr_t workspace, int device, uintptr_t stream_address) const {
    const DeviceGuard guard(device);
    const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_address);
    double* const totals = reinterpret_cast<double*>(workspace) + 1;
    // A graph may be replayed beside the stream it was captured on, so its launches count in their own workspace.
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &capturing), "asking whether a stream is being captured");
    unsigned* ticket = capturing == cudaStreamCaptureStatusNone ? ticket_of(device, stream) : nullptr;
    if (ticket == nullptr) {
      ticket = reinterpret_cast<unsigned*>(workspace);
      check(cudaMemsetAsync(ticket, 0, sizeof *ticket, stream), "clearing a ticket");
    }
    for (const AlignLaunch& launch : launches_) {
      launch_align(launch, reinterpret_cast<float*>(losses), totals, totals + layers_, ticket, stream);
    }
  }

  std::vector<const char*> paths() const {
    std::vector<const char*> names(layers_);
    for (const AlignLaunch& launch : launches_) {
      for (int l = 0; l < launch.table.layers; ++l) {
        const DeviceLayer& layer = launch.table.layer[l];
        names[size_t(layer.place)] = layer.path == Path::tile ? "tile" : "direct";
      }
    }
    return names;
  }

  size_t launches() const { return launches_.size(); }

 private:
  std::vector<AlignLaunch> launches_;
  size_t layers_;
};

typedef std::tuple<uintptr_t, uintptr_t, int, int64_t, double> Scaled;

void scale_gradients(const std::vector<Scaled>& layers, uintptr_t upstream, int64_t upstream_stride, int device,
                     uintptr_t stream) {
  const DeviceGuard guard(device);
  std::vector<ScaledGradient> described;
  for (const auto& [stored, out, dtype, numbers, power] : layers) {
    described.push_back(
        {reinterpret_cast<const char*>(stored), reinterpret_cast<char*>(out), numbers, power, DType(dtype)});
  }
  launch_scale(described.data(), int(described.size()), reinterpret_cast<const float*>(upstream), upstream_stride,
               reinterpret_cast<cudaStream_t>(stream));
}

std::string obstacle(int device) {
  try {
    const DeviceGuard guard(device);
    return obstacle_to_align();
  } catch (const std::runtime_error& error) {  // no driver, or one that is older than this build's CUDA
    return error.what();
  }
}

}  // namespace
}  // namespace skd

PYBIND11_MODULE(_cuda, m) {
  using namespace skd;
  m.doc() = "CUDA kernels. Tensors cross as address, dtype code, shape and strides (in elements).";
#if defined(SKD_CUDA_ON_CPU)
  m.attr("device_type") = "cpu";
#else
  m.attr("device_type") = "cuda";
#endif
  bind_layers(m);
  bind_spectra(m);
  m.def("obstacle", &obstacle, py::arg("device"), "Why a device cannot run the kernels, or an empty string.");
  py::class_<AlignPlan>(m, "AlignPlan", "The launches of one call of spectral_align.")
      .def(py::init<const std::vector<AlignArguments>&, bool>(), py::arg("layers"), py::arg("reduce"))
      .def_property_readonly("workspace_doubles", &AlignPlan::workspace_doubles, "Memory that launch() needs.")
      .def_property_readonly("paths", &AlignPlan::paths, "Per layer, in the order of the call, \"tile\" or \"direct\".")
      .def_property_readonly("launches", &AlignPlan::launches, "How many kernels launch() starts.")
      .def("launch", &AlignPlan::launch, py::arg("losses"), py::arg("workspace"), py::arg("device"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>(),
           "Starts the kernels; losses (float32) and gradients are there when the stream has done them.");
  m.def("scale_gradients", &scale_gradients, py::arg("layers"), py::arg("upstream"), py::arg("upstream_stride"),
        py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "Per layer (stored, out, dtype, numbers, power): out = stored * (upstream * power).");
}
