// Launching a kernel, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace skd {

inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // one that does not last is taken back, so that the next call does not report it again
  throw std::runtime_error(std::string("skd: ") + doing + ": " + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes, cudaStream_t stream,
         Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "launching a kernel");
}

// What a block may have on every architecture since sm_80; beyond 48 KB a kernel has to ask for it.
constexpr int kMostSharedBytes = 96 << 10;

template <class Kernel>
void allow_shared_memory(Kernel* kernel, int shared_bytes) {
  if (shared_bytes <= 48 << 10) return;
  // Always the most: another thread may be about to launch the same kernel with another size.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes),
        "asking for shared memory");
}

// Makes a device the current one, and the one before afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "choosing the device of the maps");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace skd
