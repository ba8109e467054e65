// The launches behind skd._cuda.FourierPlan, on the current device.
#pragma once

#include <cuda_runtime.h>

#include "cuda/fourier_plan.h"

namespace skd {

// Runs a plan whose place() has been called. `losses`: one per layer, or null.
void run_fourier(const FourierPlan& plan, float* losses, cudaStream_t stream);

// The kernels for planes with codelets; `longest` is 16, 32 or 56. In files of their own, which compile beside each
// other.
void launch_fourier_16(const FourierLaunch& launch, cudaStream_t stream);
void launch_fourier_32(const FourierLaunch& launch, cudaStream_t stream);
void launch_fourier_56(const FourierLaunch& launch, cudaStream_t stream);

// --- What blocks leave, added up by a second kernel, which spectral_intensity uses as well ---

struct BlockSums {
  const double* shares;  // of a loss, `blocks` of them, or null
  float* loss;
  const float* sums;  // [groups, blocks, numbers], or null
  float* spectra;     // [groups, numbers]
  int64_t groups, numbers;
  int64_t blocks;
  double scale;  // of the spectra
};

void add_block_sums(const std::vector<BlockSums>& layers, cudaStream_t stream);

}  // namespace skd
