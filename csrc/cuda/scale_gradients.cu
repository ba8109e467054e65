// Stored gradients times the upstream gradient: one launch for all layers, one read and one write of each, and nothing
// where the factor is 1 and the result may stay where it is. The factor is read on the device.
#include "common/number_formats.h"
#include "cuda/launch.h"
#include "cuda/spectral_align.h"

namespace skd {
namespace {

constexpr int kScaleThreads = 256;
constexpr int kScaleLayers = 64;    // of one launch
constexpr int kScaleBlocks = 1024;  // per layer at most; they go on in strides

struct ScaleTable {
  ScaledGradient layer[kScaleLayers];
};
static_assert(sizeof(ScaleTable) <= 4000, "kernel arguments");

template <class T>
__device__ inline void scale(const ScaledGradient& layer, float factor, bool copy) {
  constexpr int kNumbers = 16 / int(sizeof(T));
  struct alignas(16) Piece {
    T number[kNumbers];
  };
  const T* const from = reinterpret_cast<const T*>(layer.stored);
  T* const to = reinterpret_cast<T*>(layer.out);
  // Gradients are whole allocations, so this holds; a map of somebody's own making may begin elsewhere.
  const bool aligned = ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) & 15) == 0;
  const int64_t pieces = aligned ? layer.numbers / kNumbers : 0, step = int64_t(gridDim.x) * kScaleThreads;
  const int64_t thread = int64_t(blockIdx.x) * kScaleThreads + threadIdx.x;
#pragma unroll 4
  for (int64_t i = thread; i < pieces; i += step) {
    Piece piece = reinterpret_cast<const Piece*>(from)[i];
    if (!copy) {
#pragma unroll
      for (int k = 0; k < kNumbers; ++k) from_float(to_float(piece.number[k]) * factor, piece.number[k]);
    }
    reinterpret_cast<Piece*>(to)[i] = piece;
  }
  for (int64_t i = pieces * kNumbers + thread; i < layer.numbers; i += step)
    from_float(to_float(from[i]) * factor, to[i]);
}

__global__ void __launch_bounds__(kScaleThreads)
    scale_gradients_kernel(const __grid_constant__ ScaleTable table, const float* upstream, int64_t upstream_stride) {
  const ScaledGradient& layer = table.layer[blockIdx.y];
  const float factor = float(double(upstream[blockIdx.y * upstream_stride]) * layer.power);
  if (factor == 1.0f && layer.stored == layer.out) return;
  switch (layer.dtype) {
    case DType::bfloat16: return scale<bfloat16>(layer, factor, factor == 1.0f);
    case DType::float16: return scale<float16>(layer, factor, factor == 1.0f);
    default: return scale<float>(layer, factor, factor == 1.0f);
  }
}

}  // namespace

void launch_scale(const ScaledGradient* layers, int count, const float* upstream, int64_t upstream_stride,
                  cudaStream_t stream) {
  for (int first = 0; first < count; first += kScaleLayers) {
    ScaleTable table{};
    const int here = count - first < kScaleLayers ? count - first : kScaleLayers;
    int64_t blocks = 0;
    for (int l = 0; l < here; ++l) {
      table.layer[l] = layers[first + l];
      const int64_t per_block = 4 * kScaleThreads * (layers[first + l].dtype == DType::float32 ? 4 : 8);
      const int64_t needed = (layers[first + l].numbers + per_block - 1) / per_block;
      if (needed > blocks) blocks = needed;
    }
    if (blocks == 0) continue;
    const dim3 grid(unsigned(blocks < kScaleBlocks ? blocks : kScaleBlocks), unsigned(here));
    run(scale_gradients_kernel, grid, kScaleThreads, 0, stream, table, upstream + first * upstream_stride,
        upstream_stride);
  }
}

}  // namespace skd
