// Magnitudes of the transform over channels, averaged over positions, in one read of the map.
//
// The way of a tile: 16-byte asynchronous copies bring all channels of some positions into shared memory, in the order
// of the map's own memory; the first pass of the transform reads them there. Passes go between two buffers, shared by
// the block's threads with a barrier after each; the last step turns pairs of bins into magnitudes, and a thread adds
// up those of its bins over the positions. Each block adds its tiles to sums of its own, which block_sums.cu adds up.
#include "common/alignment.h"
#include "common/number_formats.h"
#include "cuda/block_fft.h"
#include "cuda/fourier_align.h"
#include "cuda/launch.h"
#include "cuda/map_numbers.h"
#include "cuda/spectral_intensity.h"
#include "cuda/stretches.h"

namespace skd {
namespace {

static_assert(sizeof(ChannelIntensity) <= 4096, "kernel arguments");
static_assert(kIntensityHead % 16 == 0, "buffers begin at 16-byte boundaries");

// Where the numbers of a tile are: channel c at position p is the one of index c * channel + p * position.
struct Numbers {
  const char* start;
  int channel, position;
  DType dtype;

  __device__ float at(int p, int c) const {
    const int i = c * channel + p * position;
    if (dtype == DType::float32) return reinterpret_cast<const float*>(start)[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(start)[i];
    return dtype == DType::bfloat16 ? to_float(bfloat16{bits}) : to_float(float16{bits});
  }
};

template <class T>
__device__ inline Numbers fetch_positions(const ChannelIntensity& of, int64_t image, int64_t first, int positions,
                                          char* shared) {
  const DeviceMap& map = of.map;
  const int pitch = map.pitch / int(sizeof(T));
  const int64_t size = sizeof(T);
  if (map.order == Order::channels) {
    const int64_t step = of.columns > 1 ? map.stride[3] : map.stride[2];
    char* const start = map.data + (image * map.stride[0] + first * step) * size;
    const Stretches stretches{start, positions, int(of.channels * size), step * size};
    fetch<T>(stretches, map, shared);
    return {shared + remainder_of(start), 1, pitch, map.dtype};
  }
  char* const start = map.data + (image * map.stride[0] + first) * size;
  const Stretches stretches{start, of.channels, int(positions * size), map.stride[1] * size};
  fetch<T>(stretches, map, shared);
  return {shared + remainder_of(start), pitch, 1, map.dtype};
}

// The same for maps that do not lie in pieces, number by number and converted.
__device__ inline Numbers read_positions(const ChannelIntensity& of, int64_t image, int64_t first, int positions,
                                         float* to) {
  const DeviceMap& map = of.map;
  const int pitch = 2 * of.pitch, all = of.channels * positions;
  const bool by_channel = map.order == Order::channels;
#pragma unroll 4
  for (int i = threadIdx.x; i < all; i += kThreads) {
    const int c = by_channel ? i % of.channels : i / positions, p = by_channel ? i / of.channels : i % positions;
    const int64_t position = first + p, row = position / of.columns;
    const int64_t at =
        image * map.stride[0] + c * map.stride[1] + row * map.stride[2] + (position - row * of.columns) * map.stride[3];
    to[p * pitch + c] = number_at(map, at);
  }
  return {reinterpret_cast<const char*>(to), 1, pitch, DType::float32};
}

__device__ inline void add_tile(const ChannelIntensity& of, const FftPlan<float>& plan, const Numbers& numbers,
                                int positions, Bin* first_buffer, Bin* second_buffer, float* sums, bool first) {
  const Transforms<int> transforms{positions, 1, of.pitch, 0, 1};
  const bool packed = plan.packed;
  Bin* const from = run_passes(
      plan, transforms,
      [&](int p, int i) SKD_INLINED {
        if (!packed) return Complex<float>{numbers.at(p, i), 0.0f};
        return Complex<float>{numbers.at(p, 2 * i), numbers.at(p, 2 * i + 1)};
      },
      second_buffer, first_buffer);
  Bin* const to = from == first_buffer ? second_buffer : first_buffer;
  float* const magnitudes = reinterpret_cast<float*>(to);
  const int pairs = (packed ? plan.points / 2 : of.channels / 2) + 1, magnitudes_pitch = of.bins | 1;
  for (int i = threadIdx.x; i < positions * pairs; i += kThreads) {
    const int p = i / pairs, k = i % pairs;
    const Bin* const bins = from + p * of.pitch;
    const auto load = [&](int j) SKD_INLINED { return load_bin(bins + j); };
    const auto store = [&](int j, Complex<float> x)
                           SKD_INLINED { magnitudes[p * magnitudes_pitch + j] = polar(x).size; };
    if (packed) {
      fft_bins_of_halves(plan, k, load, store);
    } else {
      store(k, load(k));
    }
  }
  __syncthreads();
  for (int k = threadIdx.x; k < of.bins; k += kThreads) {
    double sum = first ? 0 : sums[k];
    for (int p = 0; p < positions;) {
      const int end = positions - p > kTermsInFloat ? p + kTermsInFloat : positions;
      float terms = 0;
      for (; p < end; ++p) terms += magnitudes[p * magnitudes_pitch + k];
      sum += terms;
    }
    sums[k] = float(sum);
  }
  __syncthreads();  // before the next tile is fetched
}

__global__ void __launch_bounds__(kThreads, 4) channel_intensity_kernel(const __grid_constant__ ChannelIntensity of) {
  SKD_SHARED_MEMORY(shared);
  FftPlan<float>* const plan = reinterpret_cast<FftPlan<float>*>(shared + 16);
  char* const work = of.slot > 0 ? of.slots + blockIdx.x * of.slot : shared + kIntensityHead;
  Bin *const first_buffer = reinterpret_cast<Bin*>(work), *const second_buffer =
                                                              reinterpret_cast<Bin*>(work + of.buffer);
  Complex<float>* const table = reinterpret_cast<Complex<float>*>(work + 2 * of.buffer);
  fill_twiddles(of.plan, table);
  set_plan(plan, of.plan, table);
  __syncthreads();
  for (int64_t block = blockIdx.x; block < of.images * of.blocks; block += gridDim.x) {
    const int64_t image = block / of.blocks;
    float* const sums = of.sums + block * of.bins;
    bool first = true;
    for (int64_t tile = block % of.blocks; tile < of.tiles; tile += of.blocks) {
      const int64_t at = tile * of.positions, left = of.all_positions - at;
      const int positions = left < of.positions ? int(left) : of.positions;
      Numbers numbers;
      if (!of.in_pieces) {
        numbers = read_positions(of, image, at, positions, reinterpret_cast<float*>(work));
      } else if (of.map.dtype == DType::float32) {
        numbers = fetch_positions<float>(of, image, at, positions, work);
      } else {
        numbers = fetch_positions<bfloat16>(of, image, at, positions, work);
      }
      wait_for_copies();
      __syncthreads();
      add_tile(of, *plan, numbers, positions, first_buffer, second_buffer, sums, first);
      first = false;
    }
  }
}

}  // namespace

void run_channel_intensity(const ChannelIntensity& of, cudaStream_t stream) {
  if (of.launched == 0) return;
  allow_shared_memory(channel_intensity_kernel, of.shared_bytes);
  run(channel_intensity_kernel, dim3(unsigned(of.launched)), kThreads, of.shared_bytes, stream, of);
  add_block_sums({{nullptr, nullptr, of.sums, of.out, of.images, of.bins, of.blocks, of.scale}}, stream);
}

}  // namespace skd
