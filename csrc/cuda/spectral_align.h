// The launches behind skd._cuda, on the current device.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/align_plan.h"

namespace skd {

constexpr int kStreamTickets = 1024;

// losses: one per layer, or their sum; totals: a double per layer of the call; shares: a double per block; ticket: a
// zero, and a zero again afterwards.
void launch_align(const AlignLaunch& launch, float* losses, double* totals, double* shares, unsigned* ticket,
                  cudaStream_t stream);

// Zeros on the current device for launches that follow each other on a stream, kStreamTickets of them.
unsigned* stream_tickets();

// Why the current device cannot run the kernels, or nothing.
std::string obstacle_to_align();

struct ScaledGradient {
  const char* stored;
  char* out;  // may be `stored`
  int64_t numbers;
  double power;
  DType dtype;
};

// out = stored * (upstream[l * stride] * power) for every layer l.
void launch_scale(const ScaledGradient* layers, int count, const float* upstream, int64_t upstream_stride,
                  cudaStream_t stream);

}  // namespace skd
