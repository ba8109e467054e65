// fourier_align's kernel for planes whose lengths have codelets.
//
// The way of a tile: a block fetches whole planes of both maps into shared memory (stretches.h: 16-byte asynchronous
// copies in the order of the map's own memory). A thread takes a row: pools it, transforms it in registers and stores
// its bins in the work memory. A thread takes a column there, of either map. Threads compare bin by bin and leave the
// gradient's spectrum; a column each go back, then a row each, which becomes numbers in the student's place; and the
// tile leaves as it came. Every step ends with a barrier.
#pragma once

#include "common/channel_pool.h"
#include "common/number_formats.h"
#include "cuda/fourier_bins.h"
#include "cuda/map_numbers.h"
#include "cuda/stretches.h"

namespace skd {
namespace {

// --- Lengths ---

// Calls work(Index<n>()) for a length n that the kernel has codelets for; the plan allows no other.
template <int kLongest, class Work>
__device__ inline void with_length(int n, Work work) {
  if constexpr (kLongest == 16) {
    switch (n) {
      case 4: return work(Index<4>());
      case 7: return work(Index<7>());
      case 8: return work(Index<8>());
      case 14: return work(Index<14>());
      case 16: return work(Index<16>());
    }
  } else if constexpr (kLongest == 32) {
    switch (n) {
      case 28: return work(Index<28>());
      case 32: return work(Index<32>());
    }
  } else {
    work(Index<56>());
  }
}

// --- A tile ---

// A map's part of it: where it begins in shared memory, and its strides in elements.
struct Part {
  int start;
  Strides strides;
};

struct FourierTile {
  char* shared;
  Tile place;
  int planes, teacher_begin;
  Part student, teacher;
  Bin* work;
};

__device__ inline Part fetch_part(const DeviceMap& map, const DeviceLayer& maps, const Tile& tile, char* shared) {
  const int positions = tile.rows * maps.columns;
  if (map.dtype == DType::float32) {
    const Stretches stretches = stretches_of<float>(map, maps, tile);
    fetch<float>(stretches, map, shared + map.offset);
    return {map.offset + remainder_of(stretches.start), strides_of<float>(map, positions)};
  }
  const Stretches stretches = stretches_of<bfloat16>(map, maps, tile);
  fetch<bfloat16>(stretches, map, shared + map.offset);
  return {map.offset + remainder_of(stretches.start), strides_of<bfloat16>(map, positions)};
}

__device__ inline void write_back_part(const DeviceMap& map, const DeviceLayer& maps, const Tile& tile,
                                       const char* part) {
  const int lanes_log2 = maps.student.lanes_log2, pitch = maps.student.pitch;
  if (map.dtype == DType::float32) {
    write_back<float>(stretches_of<float>(map, maps, tile), lanes_log2, pitch, part);
  } else {
    write_back<bfloat16>(stretches_of<bfloat16>(map, maps, tile), lanes_log2, pitch, part);
  }
}

// --- Rows ---

template <class T, int W>
__device__ inline void add_numbers(float (&x)[W], const T* p, int step) {
#pragma unroll
  for (int j = 0; j < W; ++j) x[j] += to_float(p[j * step]);
}

template <int W>
__device__ inline void add_row(float (&x)[W], const char* shared, const Part& part, DType dtype, int channel, int row) {
  const int at = channel * part.strides.channel + row * W * part.strides.position, step = part.strides.position;
  const char* const start = shared + part.start;
  switch (dtype) {
    case DType::bfloat16: return add_numbers(x, reinterpret_cast<const bfloat16*>(start) + at, step);
    case DType::float16: return add_numbers(x, reinterpret_cast<const float16*>(start) + at, step);
    default: return add_numbers(x, reinterpret_cast<const float*>(start) + at, step);
  }
}

template <class T, int W>
__device__ inline void store_numbers(const float (&x)[W], T* p, int step) {
#pragma unroll
  for (int j = 0; j < W; ++j) from_float(x[j], p[j * step]);
}

template <int W>
__device__ inline void store_row(const float (&x)[W], char* shared, const Part& part, DType dtype, int channel,
                                 int row) {
  const int at = channel * part.strides.channel + row * W * part.strides.position, step = part.strides.position;
  char* const start = shared + part.start;
  switch (dtype) {
    case DType::bfloat16: return store_numbers(x, reinterpret_cast<bfloat16*>(start) + at, step);
    case DType::float16: return store_numbers(x, reinterpret_cast<float16*>(start) + at, step);
    default: return store_numbers(x, reinterpret_cast<float*>(start) + at, step);
  }
}

// The row of an array: of the pooled teacher, of the student, or of their difference, in one piece of code, so that
// equal maps have equal spectra.
template <int W>
__device__ inline void load_row(float (&x)[W], const FourierLayer& layer, const FourierTile& tile, int array, int plane,
                                int row) {
  const bool difference = layer.with_teacher && layer.compare == Compare::complex;
#pragma unroll
  for (int j = 0; j < W; ++j) x[j] = 0;
  const int first = array == 1 || difference ? 1 : 0;
#pragma unroll 1
  for (int map = first; map >= array; --map) {
    int begin = plane, count = 1;
    if (map == 1) {
      const DeviceLayer& maps = layer.maps;
      const ChannelWindow window = channel_window(tile.place.channel + plane, maps.teacher_channels, maps.width);
      begin = int(window.begin) - tile.teacher_begin;
      count = int(window.end - window.begin);
    }
    const Part part = map == 1 ? tile.teacher : tile.student;
    const DType dtype = map == 1 ? layer.maps.teacher.dtype : layer.maps.student.dtype;
#pragma unroll 1
    for (int c = 0; c < count; ++c) add_row(x, tile.shared, part, dtype, begin + c, row);
    const float share = 1.0f / float(count), factor = map > array ? -share : share;
    if (factor == 1.0f) continue;
#pragma unroll
    for (int j = 0; j < W; ++j) x[j] *= factor;
  }
}

struct Row {
  int plane, row;
};
__device__ inline Row row_of_item(int item, int planes, int height, bool planes_first) {
  const Divisor<int> by(planes_first ? planes : height);
  const int quotient = by.quotient(item), rest = item - quotient * by.divisor;
  return planes_first ? Row{rest, quotient} : Row{quotient, rest};
}

template <int W>
__device__ inline void forward_rows(const FourierLayer& layer, const FourierTile& tile) {
  const int height = layer.maps.height, rows = tile.planes * height;
  for (int item = threadIdx.x; item < rows * layer.arrays; item += kThreads) {
    const int array = item >= rows;
    const bool planes_first = layer.planes_first[array];
    const Row at = row_of_item(item - array * rows, tile.planes, height, planes_first);
    float x[W];
    load_row(x, layer, tile, array, at.plane, at.row);
    Bin* const out = tile.work + (array * tile.planes + at.plane) * layer.plane_pitch + at.row * layer.row_pitch;
    fft_real_forward<W>([&](int j) SKD_INLINED { return x[j]; },
                        [&](int k, Complex<float> bin) SKD_INLINED { store_bin(out + k, bin); });
  }
}

template <int W>
__device__ inline void adjoint_rows(const FourierLayer& layer, const FourierTile& tile) {
  const DeviceLayer& maps = layer.maps;
  const int height = maps.height, rows = tile.planes * height;
  const float scale = maps.gradient_scale * layer.norm;
  for (int item = threadIdx.x; item < rows; item += kThreads) {
    const Row at = row_of_item(item, tile.planes, height, layer.planes_first[0]);
    const Bin* const bins = tile.work + at.plane * layer.plane_pitch + at.row * layer.row_pitch;
    float x[W];
    fft_half_adjoint<W>([&](int k) SKD_INLINED { return exchanged(load_bin(bins + k)); },
                        [&](int j, float g) SKD_INLINED { x[j] = g * scale; });
    if (maps.staged) {
      store_row(x, tile.shared, tile.student, maps.student.dtype, at.plane, at.row);
    } else {
      const int64_t* stride = maps.gradient.stride;
      const int64_t to =
          tile.place.image * stride[0] + (tile.place.channel + at.plane) * stride[1] + at.row * stride[2];
#pragma unroll
      for (int j = 0; j < W; ++j) store_gradient(maps.gradient, to + j * stride[3], x[j]);
    }
  }
}

// --- Columns ---

// Of `planes` planes of the work memory, in place. An odd pitch has threads of half a warp in different banks; where
// the bins are even in number its last one idles. Backward is the same with real and imaginary parts exchanged on both
// sides, as those before and after leave them.
template <int H>
__device__ inline void transform_columns(const FourierLayer& layer, Bin* work, int planes) {
  const int pitch = layer.row_pitch, odd_bins = layer.row_bins | 1;
  const Divisor<int> by_columns(odd_bins);
  for (int item = threadIdx.x; item < planes * odd_bins; item += kThreads) {
    const int plane = by_columns.quotient(item), kx = item - plane * odd_bins;
    if (kx >= layer.row_bins) continue;
    Bin* const column = work + plane * layer.plane_pitch + kx;
    fft_forward<H>([&](int j) SKD_INLINED { return load_bin(column + j * pitch); },
                   [&](int j, Complex<float> x) SKD_INLINED { store_bin(column + j * pitch, x); });
  }
}

// --- All steps ---

// Returns the thread's share of the loss.
template <int kLongest>
__device__ inline double align_tile(const FourierLayer& layer, const Walk& walk, int64_t index, char* shared) {
  const DeviceLayer& maps = layer.maps;
  FourierTile tile;
  tile.shared = shared;
  tile.place.image = int(index / maps.channel_tiles);
  tile.place.channel = int(index % maps.channel_tiles) * maps.channels;
  tile.place.channels = tile.planes = min(maps.channels, maps.width - tile.place.channel);
  tile.place.row = 0;
  tile.place.rows = maps.height;
  tile.work = reinterpret_cast<Bin*>(shared + layer.work);
  tile.student = fetch_part(maps.student, maps, tile.place, shared);
  tile.teacher = tile.student;
  tile.teacher_begin = 0;
  if (layer.with_teacher) {
    Tile place = tile.place;
    place.channel = int(channel_window(tile.place.channel, maps.teacher_channels, maps.width).begin);
    place.channels = int(channel_window(tile.place.channel + tile.planes - 1, maps.teacher_channels, maps.width).end) -
                     place.channel;
    tile.teacher_begin = place.channel;
    tile.teacher = fetch_part(maps.teacher, maps, place, shared);
  }
  wait_for_copies();
  __syncthreads();
  with_length<kLongest>(maps.columns, [&](auto w) { forward_rows<w>(layer, tile); });
  __syncthreads();
  double sum = 0;
  // Columns forward, and back with the gradient of their bins: a loop, so that the codelets are there once.
#pragma unroll 1
  for (int way = 0; way < 2; ++way) {
    const int planes = way == 0 ? tile.planes * layer.arrays : tile.planes;
    with_length<kLongest>(maps.height, [&](auto h) { transform_columns<h>(layer, tile.work, planes); });
    __syncthreads();
    if (way == 1) break;
    const TileSpectra<int> spectra{tile.work, tile.planes, tile.planes, tile.planes * layer.plane_pitch};
    float* const largest = reinterpret_cast<float*>(shared + layer.largest);
    sum = work_on_bins(layer, spectra, sums_of_block(layer, walk), index == walk.tile, largest);
    if (maps.gradient.data == nullptr) return sum;
  }
  with_length<kLongest>(maps.columns, [&](auto w) { adjoint_rows<w>(layer, tile); });
  __syncthreads();
  if (maps.staged) {
    write_back_part(maps.gradient, maps, tile.place, shared + tile.student.start);
    __syncthreads();  // before the next tile is fetched
  }
  return sum;
}

constexpr int blocks_at_once(int longest) { return longest <= 16 ? 4 : longest <= 32 ? 3 : 2; }

template <int kLongest>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kLongest))
    fourier_tiles_kernel(const __grid_constant__ FourierTable table) {
  SKD_SHARED_MEMORY(shared);
  int l = 0;
  while (l + 1 < table.layers && table.layer[l + 1].first_block <= int(blockIdx.x)) ++l;
  const FourierLayer& layer = table.layer[l];
  const Walk walk = walk_of_block(layer, int(blockIdx.x) - layer.first_block);
  double sum = 0;
  for (int64_t tile = walk.tile; tile < walk.end; tile += walk.step) {
    sum += align_tile<kLongest>(layer, walk, tile, shared);
  }
  write_share(layer, walk, sum, shared);
}

}  // namespace
}  // namespace skd
