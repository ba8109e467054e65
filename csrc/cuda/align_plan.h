// How spectral_align's layers are cut into blocks of threads: decided on the host, read by the kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "common/align_layer.h"

namespace skd {

constexpr int kThreads = 128;
constexpr int kLayersPerLaunch = 16;  // their table is a kernel argument, of which there may be 4 KB
constexpr int kTileBytes = 24 << 10;  // both maps' parts, without padding
constexpr int kSharedBytes = 48 << 10;
constexpr int kRowsPerGroup = 4;  // of the direct path

// Path::tile: the block fetches parts of both maps into shared memory in 16-byte pieces, and writes the gradient the
// same way. Path::direct: every number is read where it lies; any strides and pooled students.
enum class Path : int8_t { tile, direct };

// What lies side by side in a map: neighbouring channels (token maps, NHWC), whole planes (NCHW), or nothing.
enum class Order : int8_t { channels, planes, any };

struct DeviceMap {
  char* data;
  int64_t stride[4];
  DType dtype;
  int pitch;   // bytes between the stretches of a tile in shared memory, 0 if the tile is one stretch
  int offset;  // of the tile in shared memory
  Order order;
  int8_t lanes_log2;  // threads that fetch one stretch together
};

struct DeviceLayer {
  DeviceMap student, teacher, gradient;
  double loss_scale;
  float row_weight, gradient_scale;
  int batch, student_channels, teacher_channels, width, height, columns;
  int ratio;           // teacher channels per pooled channel, 0 if it is no whole number
  int channels, rows;  // of a tile, at most
  int channel_tiles, row_tiles;
  int first_block, place;  // of the layer in the launch, and among the call's layers
  Path path;
  int8_t lanes;  // threads that share a row, an even number: then a lane's columns are of one parity
  bool rows_first;
  bool staged;  // the gradient leaves through the student's tile
};

struct DeviceTable {
  DeviceLayer layer[kLayersPerLaunch];
  int layers, all_layers;
  int blocks;
  bool last, reduce;
};
static_assert(sizeof(DeviceTable) <= 4096 - 4 * sizeof(void*), "kernel arguments, with the results' addresses");

struct AlignLaunch {
  DeviceTable table;
  int shared_bytes;
};

// The launches of a call: one for all layers of one path and pair of dtypes, kLayersPerLaunch at most.
std::vector<AlignLaunch> plan_align(const std::vector<AlignArguments>& layers, bool reduce);

inline int bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace skd
