// How the layers of fourier_align, and the maps of spectral_intensity over space, are cut into blocks of threads:
// decided on the host, read by the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "common/fft_lengths.h"
#include "common/fourier_layer.h"
#include "cuda/align_plan.h"

namespace skd {

constexpr int kFourierLayers = 12;   // of a launch
constexpr int kFourierScratch = 48;  // bytes for the threads' sums at the beginning of shared memory

// A number of a spectrum where it lies in memory, in one access.
struct alignas(8) Bin {
  float re, im;
};

// A block walks some tiles, each of them some whole planes of one image: both maps' spectra lie beside each other in
// its work memory, an array each, with these pitches (in bins). Planes whose two lengths are among 4, 7, 8, 14, 16, or
// 28, 32, or 56, have kernels with codelets that fetch the maps in 16-byte pieces; the general kernel reads number by
// number, transforms any lengths, and its work memory may be global.
struct FourierLayer {
  DeviceLayer maps;    // its tiles' channels are pooled ones
  const float* bands;  // [H, bins of a row] or null
  float* spectra;      // [groups, maps with spectra, H, bins of a row] or null
  double* shares;      // of the loss, one per block
  float* sums;         // of magnitudes: [blocks, maps with spectra, H, bins of a row]
  Compare compare;
  float norm, focal, inner_weight;
  bool with_teacher, planes_first[2];  // [map]: whether threads that follow each other take planes or rows
  int8_t arrays;                       // 2 where both spectra are needed
  int row_bins, row_pitch, plane_pitch;
  int largest, work;        // offsets in shared memory
  int64_t tiles, groups;    // of a group, each of which has sums of its own: the images for spectral_intensity
  int blocks, first_block;  // of a group; of the layer in the launch (the general kernel may launch fewer)
};

struct FourierTable {
  FourierLayer layer[kFourierLayers];
  int layers;
};
static_assert(sizeof(FourierTable) <= 4096, "kernel arguments");

// What the general kernel needs besides: one layer in a launch.
struct GeneralFourier {
  FourierLayer layer;
  FftPlan<float> rows, columns;
  int row_twiddles, column_twiddles;  // in their tables
  int64_t buffer;                     // bins of each of the two buffers that passes go between
  int64_t slot;                       // bytes of global memory for each block, 0 where shared memory suffices
  char* slots;
};
static_assert(sizeof(GeneralFourier) <= 4096, "kernel arguments");

struct FourierLaunch {
  int longest;  // 16, 32 or 56: which kernel; 0 for the general one
  int64_t blocks;
  int shared_bytes;
  FourierTable table;      // of the former
  GeneralFourier general;  // of the latter
};

struct FourierPlan {
  std::vector<FourierLaunch> launches;
  std::vector<const char*> paths;           // per layer, in the order of the call: "tile" or "general"
  std::vector<std::pair<int, int>> places;  // per layer: its launch, and its place there
  int64_t shares, sums, slots;              // doubles, floats and bytes of workspace

  int64_t workspace_doubles() const { return shares + (sums + 1) / 2 + (slots + 7) / 8; }
  // Tells the kernels where their workspace is.
  void place(double* workspace);
};

FourierPlan plan_fourier(const std::vector<FourierArguments>& layers);

// The mean magnitudes over channels of |rfft2(x)| * scale, for each image.
FourierPlan plan_space_intensity(const Map& x, float* out, double scale);

}  // namespace skd
