// Losses on half spectra, their gradients and the pooled magnitudes: the launches, and the kernel for everything that
// fourier_tiles.h's does not take: any strides and lengths, pooled students, and planes beyond shared memory.
#include "cuda/block_fft.h"
#include "cuda/fourier_align.h"
#include "cuda/launch.h"
#include "cuda/map_numbers.h"

namespace skd {
namespace {

// --- A tile of the general kernel ---

struct GeneralTile {
  int64_t image;
  int channel, counted, planes;  // pooled channels; planes beyond the counted ones complete the gradient
};

// Calls work(plane, row, column) for all numbers of the tile's planes, neighbours in memory one after another.
template <class Work>
__device__ inline void for_each_number(const DeviceLayer& maps, Order order, int planes, Work work) {
  const int64_t positions = int64_t(maps.height) * maps.columns, all = positions * planes;
  for (int64_t i = threadIdx.x; i < all; i += kThreads) {
    const int64_t plane = order == Order::channels ? i % planes : i / positions;
    const int64_t position = order == Order::channels ? i / planes : i % positions;
    work(int(plane), int(position / maps.columns), int(position % maps.columns));
  }
}

__device__ inline void load_tile(const FourierLayer& layer, const GeneralTile& tile, Bin* to, int64_t array) {
  const DeviceLayer& maps = layer.maps;
  const bool even = maps.columns % 2 == 0;
  const bool difference = layer.with_teacher && layer.compare == Compare::complex;
  const auto number = [&](const DeviceMap& map, int channels, int plane, int row, int column) {
    const int64_t at = tile.image * map.stride[0] + row * map.stride[2] + column * map.stride[3];
    return pooled_at(map, at, channels, maps.width, tile.channel + plane);
  };
  for (int a = 0; a < layer.arrays; ++a) {
    const DeviceMap& map = a == 1 ? maps.teacher : maps.student;
    const int channels = a == 1 ? maps.teacher_channels : maps.student_channels;
    for_each_number(maps, map.order, tile.planes, [&](int plane, int row, int column) {
      float x = number(map, channels, plane, row, column);
      if (a == 0 && difference) x -= number(maps.teacher, maps.teacher_channels, plane, row, column);
      Bin* const bins = to + a * array + plane * int64_t(layer.plane_pitch) + row * int64_t(layer.row_pitch);
      if (even) {
        reinterpret_cast<float*>(bins)[column] = x;
      } else {
        bins[column] = Bin{x, 0.0f};
      }
    });
  }
}

// The gradient of a student's channel, from one plane or, where windows of a pooled student overlap, two of them. The
// passes have left real and imaginary parts exchanged.
__device__ inline void store_tile(const FourierLayer& layer, const GeneralTile& tile, const Bin* from) {
  const DeviceLayer& maps = layer.maps;
  const bool even = maps.columns % 2 == 0;
  const int64_t many = maps.student_channels;
  const auto first_with = [&](int64_t window) { return int((window * many + maps.width - 1) / maps.width); };
  const int begin = first_with(tile.channel), end = first_with(tile.channel + tile.counted);
  const DeviceMap& out = maps.gradient;
  const float scale = maps.gradient_scale * layer.norm;
  for_each_number(maps, out.order, end - begin, [&](int i, int row, int column) {
    const int channel = begin + i;
    const ChannelWindow windows = windows_with_channel(channel, many, maps.width);
    float g = 0;
    for (int64_t w = windows.begin; w < windows.end; ++w) {
      const ChannelWindow window = channel_window(w, many, maps.width);
      const Bin* const bins = from + (w - tile.channel) * layer.plane_pitch + row * int64_t(layer.row_pitch);
      const int at = even ? column ^ 1 : 2 * column + 1;
      g += reinterpret_cast<const float*>(bins)[at] * (1.0f / float(window.end - window.begin));
    }
    const int64_t at =
        tile.image * out.stride[0] + channel * out.stride[1] + row * out.stride[2] + column * out.stride[3];
    store_gradient(out, at, g * scale);
  });
}

// --- Its transforms ---

// From pairs of numbers to the bins of real rows, or back, in place: thread by thread, whole pairs of bins.
template <bool kAdjoint>
__device__ inline void close_rows(const FftPlan<float>& plan, Bin* bins, int64_t rows, int64_t pitch) {
  const int64_t pairs = plan.points / 2 + 1;
  for (int64_t i = threadIdx.x; i < rows * pairs; i += kThreads) {
    Bin* const row = bins + i / pairs * pitch;
    const int k = int(i % pairs);
    if constexpr (kAdjoint) {  // exchanged on both sides
      fft_halves_of_bins(
          plan, k, [&](int j) SKD_INLINED { return exchanged(load_bin(row + j)); },
          [&](int j, Complex<float> x) SKD_INLINED { store_bin(row + j, exchanged(x)); });
    } else {
      fft_bins_of_halves(
          plan, k, [&](int j) SKD_INLINED { return load_bin(row + j); },
          [&](int j, Complex<float> x) SKD_INLINED { store_bin(row + j, x); });
    }
  }
  __syncthreads();
}

__device__ inline Transforms<int64_t> rows_of(const FourierLayer& layer, int64_t planes) {
  return {planes * layer.maps.height, 1, layer.row_pitch, 0, 1};
}

__device__ inline Transforms<int64_t> columns_of(const FourierLayer& layer, int64_t planes) {
  return {planes * layer.row_bins, layer.row_bins, layer.plane_pitch, 1, layer.row_pitch};
}

// Of the numbers in `from`; both buffers are exchanged where the result is in the other. Not inlined, for it is long
// and called four times.
__device__ __noinline__ void transform(const FftPlan<float>& plan, Transforms<int64_t> those, Bin*& from, Bin*& to) {
  Bin* const in = from;
  const auto load = [&](int64_t t, int i) SKD_INLINED { return load_bin(in + those.start(t) + i * those.step); };
  if (run_passes(plan, those, load, to, from) == to) {
    from = to;
    to = in;
  }
}

__device__ inline double align_general(const FourierLayer& layer, const FftPlan<float>& rows,
                                       const FftPlan<float>& columns, int64_t index, Bin* from, Bin* to, float* sums,
                                       bool first, float* largest) {
  const DeviceLayer& maps = layer.maps;
  GeneralTile tile;
  tile.image = index / maps.channel_tiles;
  tile.channel = int(index % maps.channel_tiles) * maps.channels;
  tile.counted = min(maps.channels, maps.width - tile.channel);
  const bool windows_overlap = maps.student_channels % maps.width != 0;
  tile.planes = tile.counted + (windows_overlap && tile.channel + tile.counted < maps.width ? 1 : 0);
  const int64_t array = int64_t(tile.planes) * layer.plane_pitch, planes = int64_t(tile.planes) * layer.arrays;
  load_tile(layer, tile, from, array);
  __syncthreads();
  transform(rows, rows_of(layer, planes), from, to);
  if (rows.packed) close_rows<false>(rows, from, planes * maps.height, layer.row_pitch);
  transform(columns, columns_of(layer, planes), from, to);
  const TileSpectra<int64_t> spectra{from, tile.planes, tile.counted, array};
  const double sum = work_on_bins(layer, spectra, sums, first, largest);
  if (maps.gradient.data == nullptr) return sum;
  // Backward is forward with real and imaginary parts exchanged on both sides.
  transform(columns, columns_of(layer, tile.planes), from, to);
  if (rows.packed) {
    close_rows<true>(rows, from, int64_t(tile.planes) * maps.height, layer.row_pitch);
  } else {
    const int64_t rest = maps.columns - layer.row_bins, all = rest * maps.height * tile.planes;
    for (int64_t i = threadIdx.x; i < all; i += kThreads) {
      from[i / rest * layer.row_pitch + layer.row_bins + i % rest] = Bin{0.0f, 0.0f};
    }
    __syncthreads();
  }
  transform(rows, rows_of(layer, tile.planes), from, to);
  store_tile(layer, tile, from);
  __syncthreads();  // before the next tile is loaded
  return sum;
}

__global__ void __launch_bounds__(kThreads) fourier_general_kernel(const __grid_constant__ GeneralFourier general) {
  SKD_SHARED_MEMORY(shared);
  const FourierLayer& layer = general.layer;
  FftPlan<float>* const plans = reinterpret_cast<FftPlan<float>*>(shared + kFourierScratch);
  char* const work = general.slot > 0 ? general.slots + blockIdx.x * general.slot : shared + layer.work;
  Bin* const bins = reinterpret_cast<Bin*>(work);
  Complex<float>* const row_table = reinterpret_cast<Complex<float>*>(bins + 2 * general.buffer);
  Complex<float>* const column_table = row_table + general.row_twiddles;
  fill_twiddles(general.rows, row_table);
  fill_twiddles(general.columns, column_table);
  set_plan(plans, general.rows, row_table);
  set_plan(plans + 1, general.columns, column_table);
  __syncthreads();
  float* const largest = reinterpret_cast<float*>(shared + layer.largest);
  for (int64_t block = blockIdx.x; block < layer.groups * layer.blocks; block += gridDim.x) {
    const Walk walk = walk_of_block(layer, block);
    float* const sums = sums_of_block(layer, walk);
    double sum = 0;
    for (int64_t tile = walk.tile; tile < walk.end; tile += walk.step) {
      sum +=
          align_general(layer, plans[0], plans[1], tile, bins, bins + general.buffer, sums, tile == walk.tile, largest);
    }
    write_share(layer, walk, sum, shared);
  }
}

// --- The launches ---

BlockSums sums_of(const FourierLayer& layer, float* loss) {
  const int64_t numbers = (layer.with_teacher ? 2 : 1) * int64_t(layer.maps.height) * layer.row_bins;
  const double planes = double(layer.maps.width) * layer.maps.batch;  // of all groups
  const double scale = planes > 0 ? double(layer.groups) / planes : 0.0;
  return {layer.shares, loss, layer.sums, layer.spectra, layer.groups, numbers, layer.blocks, scale};
}

void launch(const FourierLaunch& launch, cudaStream_t stream) {
  if (launch.blocks == 0) return;
  switch (launch.longest) {
    case 16: return launch_fourier_16(launch, stream);
    case 32: return launch_fourier_32(launch, stream);
    case 56: return launch_fourier_56(launch, stream);
  }
  allow_shared_memory(fourier_general_kernel, launch.shared_bytes);
  run(fourier_general_kernel, dim3(unsigned(launch.blocks)), kThreads, launch.shared_bytes, stream, launch.general);
}

}  // namespace

void run_fourier(const FourierPlan& plan, float* losses, cudaStream_t stream) {
  for (const FourierLaunch& one : plan.launches) launch(one, stream);
  std::vector<BlockSums> sums;
  for (size_t i = 0; i < plan.places.size(); ++i) {
    const auto [at, place] = plan.places[i];
    const FourierLaunch& one = plan.launches[size_t(at)];
    sums.push_back(sums_of(one.longest == 0 ? one.general.layer : one.table.layer[place],
                           losses == nullptr ? nullptr : losses + i));
  }
  add_block_sums(sums, stream);
}

}  // namespace skd
