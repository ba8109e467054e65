// Adds up what the blocks of fourier_align and spectral_intensity left, in an order that depends on the maps alone.
#include "cuda/device.h"
#include "cuda/fourier_align.h"
#include "cuda/launch.h"

namespace skd {
namespace {

constexpr int kLayersAtOnce = 32;

struct SumsTable {
  BlockSums layer[kLayersAtOnce];
};
static_assert(sizeof(SumsTable) <= 4000, "kernel arguments");

__global__ void __launch_bounds__(kThreads) add_block_sums_kernel(const __grid_constant__ SumsTable table) {
  SKD_SHARED_MEMORY(shared);
  const BlockSums& layer = table.layer[blockIdx.y];
  if (layer.loss != nullptr && blockIdx.x == 0) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < layer.blocks * layer.groups; i += kThreads) sum += layer.shares[i];
    sum = sum_over_block(sum, reinterpret_cast<double*>(shared));
    if (threadIdx.x == 0) *layer.loss = float(sum);
  }
  if (layer.spectra == nullptr) return;
  const int64_t all = layer.groups * layer.numbers, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += step) {
    const int64_t group = i / layer.numbers;
    const float* p = layer.sums + group * layer.blocks * layer.numbers + (i - group * layer.numbers);
    double sum = 0;
#pragma unroll 8
    for (int64_t block = 0; block < layer.blocks; ++block) sum += p[block * layer.numbers];
    layer.spectra[i] = float(sum * layer.scale);
  }
}

}  // namespace

void add_block_sums(const std::vector<BlockSums>& layers, cudaStream_t stream) {
  for (size_t first = 0; first < layers.size(); first += kLayersAtOnce) {
    SumsTable table{};
    const size_t here = layers.size() - first < kLayersAtOnce ? layers.size() - first : kLayersAtOnce;
    int64_t most = 1;
    for (size_t l = 0; l < here; ++l) {
      const BlockSums& layer = table.layer[l] = layers[first + l];
      const int64_t blocks = layer.spectra == nullptr ? 1 : (layer.groups * layer.numbers + kThreads - 1) / kThreads;
      if (blocks > most) most = blocks;
    }
    const dim3 grid(unsigned(most < 65536 ? most : 65536), unsigned(here));
    run(add_block_sums_kernel, grid, kThreads, 64, stream, table);
  }
}

}  // namespace skd
