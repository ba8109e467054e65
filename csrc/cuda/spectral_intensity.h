// Channel spectra of a map, one per image: the plan, and its launch on the current device.
#pragma once

#include <cuda_runtime.h>

#include "common/fft_lengths.h"
#include "cuda/align_plan.h"

namespace skd {

constexpr int kIntensityHead = 16 + int(sizeof(FftPlan<float>));  // of shared memory, before the buffers

// A block walks some tiles, each of them all channels of some positions that follow each other in one image. Maps come
// in 16-byte pieces where they lie so, number by number otherwise; transforms go between two buffers of shared memory,
// or of global memory where the channels are too many.
struct ChannelIntensity {
  DeviceMap map;
  FftPlan<float> plan;
  int twiddles;  // in the plan's table
  int channels, bins;
  int pitch;      // bins between the positions of a tile in a buffer
  int positions;  // of a tile, at most
  int blocks;     // of an image
  bool in_pieces;
  int columns;
  int64_t all_positions, images, tiles;
  int64_t buffer;    // bytes of a buffer
  int64_t slot;      // bytes of global memory of each block, 0 where shared memory suffices
  int64_t launched;  // blocks; they go on to further ones of the images
  int shared_bytes;
  double scale;
  float* out;   // [images, bins]
  float* sums;  // [images, blocks, bins]
  char* slots;

  int64_t workspace_doubles() const { return (images * blocks * bins + 1) / 2 + (launched * slot + 7) / 8; }
  void place(double* workspace);
};

ChannelIntensity plan_channel_intensity(const Map& x, float* out, double scale);

void run_channel_intensity(const ChannelIntensity& plan, cudaStream_t stream);

}  // namespace skd
