// skd._cpu: pointers, shapes and strides in, numbers out. No PyTorch header, so one build serves every PyTorch.
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/bind_layers.h"
#include "cpu/spectral_align.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;

namespace skd {
namespace {

struct InstructionSet {
  const char* name;
  const AlignKernel& spectral_align;
};

// The instruction sets this processor has, the best first.
std::vector<InstructionSet> supported() {
  std::vector<InstructionSet> sets;
#if defined(SKD_X86_KERNELS)
  __builtin_cpu_init();
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if !defined(__clang__) && __GNUC__ >= 11  // others cannot ask for it; what has AVX2 has had it too
  has_avx2 = has_avx2 && __builtin_cpu_supports("f16c");
#endif
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    sets.push_back({"avx512", avx512::align_kernel});
  }
  if (has_avx2) sets.push_back({"avx2", avx2::align_kernel});
#endif
  sets.push_back({"baseline", baseline::align_kernel});
  return sets;
}

const InstructionSet* chosen = nullptr;

// Done once with the best when the module is loaded; SKD_CPU_ISA, or a test, names a lesser one.
void use_instruction_set(const std::string& name) {
  static const std::vector<InstructionSet> sets = supported();
  std::string names;
  for (const InstructionSet& set : sets) {
    names += (names.empty() ? "" : ", ") + std::string(set.name);
    if (name.empty() || name == set.name) {
      chosen = &set;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not among what this processor runs: " + names);
}

// Reused by all calls of a thread.
void* scratch_of_this_thread(size_t bytes) {
  thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    const size_t rounded = (bytes + 63) / 64 * 64;
    memory.reset();
    capacity = 0;
    memory.reset(std::aligned_alloc(64, rounded));
    if (!memory) throw std::bad_alloc();
    capacity = rounded;
  }
  return memory.get();
}

// What one core has of it. The system's own sysconf adds up all of a socket's on some machines, so Linux's files go
// first.
int64_t last_level_cache() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t amount = 0;
  char unit = ' ';
  if (file >> amount >> unit && (unit == 'K' || unit == 'M')) return unit == 'K' ? amount << 10 : amount << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 32 << 20;
}

// Calls that move more bytes than this write their gradients past the caches: half the last level, since the rest of
// the program wants room there too.
int64_t stream_above = last_level_cache() / 2;

int64_t bytes_of(const Map& map) {
  const int64_t size = map.dtype == DType::float64 ? 8 : map.dtype == DType::float32 ? 4 : 2;
  return size * map.shape[0] * map.shape[1] * map.shape[2] * map.shape[3];
}

constexpr int64_t kNumbersPerThread = 16384;  // below this a second thread costs more than it does

// The losses go to `out`: one number per layer, or their sum; float64 or float32.
void spectral_align(const std::vector<AlignArguments>& arguments, int threads, uintptr_t out, bool out_is_double,
                    bool reduce) {
  const AlignKernel& kernel = chosen->spectral_align;
  int64_t bytes = 0;
  for (const AlignArguments& layer : arguments) bytes += 2 * bytes_of(layer.student) + bytes_of(layer.teacher);
  std::vector<AlignLayer> layers;
  for (const AlignArguments& layer : arguments) {
    layers.push_back({layer, layer.gradient.data != nullptr && bytes > stream_above});
  }

  std::vector<int64_t> first_item{0};
  size_t scratch = 0;
  int64_t numbers = 0;
  for (const AlignLayer& layer : layers) {
    const int64_t* n = layer.student.shape;
    const bool empty = n[0] == 0;
    first_item.push_back(first_item.back() + (empty ? 0 : kernel.items(layer)));
    if (!empty) scratch = std::max(scratch, kernel.scratch_bytes(layer));
    numbers += n[0] * std::max(n[1], layer.teacher.shape[1]) * n[2] * n[3];
  }
  // Every item writes its own share, and they are added in order: the same sum for any number of threads.
  std::vector<double> shares(first_item.back());
  const auto run = [&](int64_t item) {
    size_t l = std::upper_bound(first_item.begin(), first_item.end(), item) - first_item.begin() - 1;
    shares[item] = kernel.run(layers[l], item - first_item[l], scratch_of_this_thread(scratch));
  };
  const int64_t useful = std::max<int64_t>(1, numbers / kNumbersPerThread);
  parallel_for(first_item.back(), int(std::min<int64_t>(std::max(threads, 1), useful)), run);

  double total = 0;
  const auto write = [&](size_t place, double value) {
    if (out_is_double) {
      reinterpret_cast<double*>(out)[place] = value;
    } else {
      reinterpret_cast<float*>(out)[place] = float(value);
    }
  };
  for (size_t l = 0; l < layers.size(); ++l) {
    double sum = 0;
    for (int64_t item = first_item[l]; item < first_item[l + 1]; ++item) sum += shares[item];
    total += sum * layers[l].loss_scale;
    if (!reduce) write(l, sum * layers[l].loss_scale);
  }
  if (reduce) write(0, total);
}

}  // namespace
}  // namespace skd

PYBIND11_MODULE(_cpu, m) {
  using namespace skd;
  const char* wanted = std::getenv("SKD_CPU_ISA");
  use_instruction_set(wanted == nullptr ? "" : wanted);

  m.doc() = "Kernels for CPUs. Tensors cross as address, dtype code, shape and strides (in elements).";
  m.def("instruction_set", [] { return chosen->name; }, "The instruction set in use.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"), "Use this one from now on.");
  py::list names;
  for (const InstructionSet& each : supported()) names.append(each.name);
  m.attr("supported_instruction_sets") = names;

  bind_layers(m);

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
}
