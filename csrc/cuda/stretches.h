// Tiles of a map in shared memory: equally long stretches of contiguous memory, fetched and written back in 16-byte
// pieces. A stretch keeps its remainder of 16 bytes, so that pieces are aligned on both sides; what is left at its ends
// goes element by element.
#pragma once

#include "cuda/align_plan.h"
#include "cuda/device.h"

namespace skd {

struct Tile {
  int image, channel, channels, row, rows;  // channels are those of the map itself, not pooled ones
};

struct Stretches {
  char* start;
  int count, bytes;
  int64_t stride;  // bytes
};

// Where the numbers of a tile lie in shared memory, in elements.
struct Strides {
  int channel, position;
};

template <class T>
__device__ inline Stretches stretches_of(const DeviceMap& map, const DeviceLayer& layer, const Tile& tile) {
  const int64_t* stride = map.stride;
  const int64_t first = tile.image * stride[0] + tile.channel * stride[1] + tile.row * stride[2];
  char* start = map.data + first * int64_t(sizeof(T));
  const int positions = tile.rows * layer.columns;
  if (map.order == Order::channels) {
    const int64_t step = layer.columns > 1 ? stride[3] : stride[2];
    return {start, positions, int(tile.channels * sizeof(T)), step * int64_t(sizeof(T))};
  }
  if (map.pitch == 0) return {start, 1, int(tile.channels * positions * sizeof(T)), 0};
  return {start, tile.channels, int(positions * sizeof(T)), stride[1] * int64_t(sizeof(T))};
}

template <class T>
__device__ inline Strides strides_of(const DeviceMap& map, int positions) {
  const int pitch = int(map.pitch / sizeof(T));
  if (map.order == Order::channels) return {1, pitch};
  return {map.pitch == 0 ? positions : pitch, 1};
}

__device__ inline int remainder_of(const char* p) { return int(reinterpret_cast<uintptr_t>(p) & 15); }

// Calls piece(stretch, offset) for every whole 16-byte piece, element(stretch, offset) for every element outside of
// them.
template <class T, class Piece, class Element>
__device__ inline void for_each_piece(const Stretches& s, int lanes_log2, Piece piece, Element element) {
  const int size = int(sizeof(T)), lanes = 1 << lanes_log2, lane = threadIdx.x & (lanes - 1);
  const int to_boundary = (16 - remainder_of(s.start)) & 15, head = to_boundary < s.bytes ? to_boundary : s.bytes;
  const int tail = head + (s.bytes - head) / 16 * 16;
  for (int i = threadIdx.x >> lanes_log2; i < s.count; i += kThreads >> lanes_log2) {
#pragma unroll 4
    for (int at = head + 16 * lane; at < tail; at += 16 * lanes) piece(i, at);
    for (int at = size * lane; at < head; at += size * lanes) element(i, at);
    for (int at = tail + size * lane; at < s.bytes; at += size * lanes) element(i, at);
  }
}

// Begins to fetch; the tile begins at shared + remainder_of(s.start).
template <class T>
__device__ inline void fetch(const Stretches& s, const DeviceMap& map, char* shared) {
  char* const tile = shared + remainder_of(s.start);
  for_each_piece<T>(
      s, map.lanes_log2, [&](int i, int at) { copy_16_bytes(tile + i * map.pitch + at, s.start + i * s.stride + at); },
      [&](int i, int at) {
        *reinterpret_cast<T*>(tile + i * map.pitch + at) = *reinterpret_cast<const T*>(s.start + i * s.stride + at);
      });
}

// Writes a tile that begins at `tile` and has the layout of another map's (`pitch`).
template <class T>
__device__ inline void write_back(const Stretches& s, int lanes_log2, int pitch, const char* tile) {
  const auto element = [&](int i, int at) {
    *reinterpret_cast<T*>(s.start + i * s.stride + at) = *reinterpret_cast<const T*>(tile + i * pitch + at);
  };
  if (remainder_of(s.start) == remainder_of(tile)) {
    for_each_piece<T>(
        s, lanes_log2,
        [&](int i, int at) {
          *reinterpret_cast<uint4*>(s.start + i * s.stride + at) =
              *reinterpret_cast<const uint4*>(tile + i * pitch + at);
        },
        element);
  } else {  // the gradient begins elsewhere between 16-byte boundaries than the student
    for_each_piece<T>(
        s, lanes_log2,
        [&](int i, int at) {
          for (int k = 0; k < 16; k += int(sizeof(T))) element(i, at + k);
        },
        element);
  }
}

}  // namespace skd
