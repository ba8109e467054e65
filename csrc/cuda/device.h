// What the kernels use of CUDA beyond the language, each with a plain twin where the hardware lacks it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/align_plan.h"

namespace skd {

// The tests compile the kernels for the CPU and bring their own of these.
#if !defined(SKD_CUDA_ON_CPU)

#define SKD_SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]

// Copies 16 bytes from global to shared memory, past the registers; they are there after wait_for_copies() and a
// barrier. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

#endif

constexpr unsigned kFullWarp = 0xffffffffu;

// The sum over the block's threads, in an order that depends on nothing; thread 0 gets it. `scratch` holds a double per
// warp. Every thread of the block takes part.
__device__ inline double sum_over_block(double value, double* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) value += scratch[warp];
  }
  __syncthreads();
  return value;
}

}  // namespace skd
