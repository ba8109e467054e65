// Magnitudes of a map's Fourier transforms over channels or space, pooled in one read of the map. Compiled once per
// instruction set (SKD_ISA).
//
// Over channels a lane is a position, over space a channel: transforms side by side, which exchange nothing. Arithmetic
// per number, over 384 channels: about 11 operations of a real transform and half a magnitude, about 8.
#include "cpu/spectral_intensity.h"

#include "cpu/half_spectrum.h"
#include "cpu/tile.h"
#include "cpu/vector_math.h"

namespace skd {
namespace SKD_ISA {
namespace {

constexpr int64_t kMostParts = 4;  // of an image, each with sums of its own
constexpr int64_t kAhead = 2;      // vectors of positions, whose memory is fetched while others are transformed

template <class A>
struct Prepared {
  FftTables<A> channels;
  FftPlan<A> plan;
  HalfSpectrum<A> space;

  explicit Prepared(const IntensityArguments& x)
      : channels(x.axis == Axis::channel ? int(x.map.shape[1]) : 1, FftKind::real),
        plan(channels.plan()),
        space(x.axis == Axis::space ? x.map.shape[2] : 1, x.axis == Axis::space ? x.map.shape[3] : 1) {}
  int64_t work() const { return max64(plan.work, space.work()); }
};

// Channels of a tile, of the transform over space.
template <class A>
int64_t channels_in_tile(const Map& map) {
  constexpr int64_t kTileBytes = 128 << 10;
  const int64_t line = kLanes<A> * map.shape[2] * map.shape[3] * int64_t(sizeof(A));
  return kLanes<A> * min64(divide_up(map.shape[1], kLanes<A>), min64(16, max64(1, kTileBytes / line)));
}

// Vectors of positions, or tiles of channels.
template <class A>
int64_t groups_of(const IntensityArguments& x) {
  return x.axis == Axis::channel ? divide_up(x.transforms(), kWidth<A>)
                                 : divide_up(x.map.shape[1], channels_in_tile<A>(x.map));
}

template <class A>
int64_t parts_of(const IntensityArguments& x) {
  const int64_t wanted = x.axis == Axis::channel ? divide_up(groups_of<A>(x), kTermsInFloat) : groups_of<A>(x);
  return min64(kMostParts, wanted);
}

template <class A>
struct IntensityScratch {
  A* tile;
  Complex<Vector<A>>*bins, *work;
  Vector<A>* magnitudes;
  size_t bytes;

  IntensityScratch(const IntensityArguments& x, const Prepared<A>& prepared, void* memory) {
    char* at = static_cast<char*>(memory);
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(at);
      at += (size_t(count) * sizeof(*pointer) + 63) / 64 * 64;
    };
    const int64_t in_space = x.map.shape[2] * x.map.shape[3] * channels_in_tile<A>(x.map);
    take(tile, x.axis == Axis::channel ? x.map.shape[1] * kWidth<A> : in_space);
    take(bins, x.bins());
    take(work, prepared.work());
    take(magnitudes, x.bins());
    bytes = size_t(at - static_cast<char*>(memory));
  }
};

// Moves the sums of a few vectors to where they do not drift.
template <class A>
void flush(Vector<A>* magnitudes, int64_t bins, double* sums) {
  for (int64_t k = 0; k < bins; ++k) {
    double total = 0;
    for (int lane = 0; lane < kWidth<A>; ++lane) total += double(magnitudes[k][lane]);
    sums[k] += total;
    magnitudes[k] = Vector<A>{};
  }
}

// --- Over channels ---

// All channels of the vector of positions that begins at `position`, one vector per channel; positions past the end are
// zeros.
template <class A, class T>
void load_positions(const Map& map, int64_t image, int64_t position, A* tile) {
  constexpr int n = kWidth<A>;
  const int64_t columns = map.shape[3], positions = map.shape[2] * columns, channels = map.shape[1];
  const int64_t count = min64(n, positions - position);
  const T* base = at<T>(map, image, 0, 0);
  const Order order = order_of(map);
  if (order == Order::planes && count == n) {
    const T* p = base + position;
    for (int64_t c = 0; c < channels; ++c, p += map.stride[1]) {
      __builtin_prefetch(p + kAhead * n);
      Access<A, A>::store(tile + c * n, Access<A, T>::load(p));
    }
    return;
  }
  const T* row[n];
  for (int i = 0; i < n; ++i) {
    const int64_t p = min64(position + i, positions - 1);
    row[i] = base + p / columns * map.stride[2] + p % columns * map.stride[3];
  }
  int64_t c = 0;
  if (order == Order::channels && count == n) {
    for (; c + n <= channels; c += n) {
      Vector<A> block[n];
      for (int i = 0; i < n; ++i) {
        __builtin_prefetch(row[i] + c + n * map.stride[3]);
        block[i] = Access<A, T>::load(row[i] + c);
      }
      transpose<A>(block);
      for (int i = 0; i < n; ++i) Access<A, A>::store(tile + (c + i) * n, block[i]);
    }
  }
  for (; c < channels; ++c) {
    for (int i = 0; i < n; ++i) tile[c * n + i] = i < count ? A(to_float(row[i][c * map.stride[1]])) : A(0);
  }
}

template <class A>
void pool_channels(const IntensityArguments& x, const Prepared<A>& prepared, int64_t image, int64_t first, int64_t last,
                   const IntensityScratch<A>& scratch, double* sums) {
  const TileLanes<A> tile{scratch.tile, kWidth<A>};
  Vector<A>* const magnitudes = scratch.magnitudes;
  for (int64_t group = first; group < last; ++group) {
    SKD_FOR_DTYPE(x.map.dtype, T, load_positions<A, T>(x.map, image, group * kWidth<A>, scratch.tile);)
    if constexpr (sizeof(A) == sizeof(float)) {
      fft_real_forward(
          prepared.plan, [&](int c) SKD_INLINED { return tile.load(c); },
          [&](int k, Complex<Vector<A>> bin) SKD_INLINED { magnitudes[k] += polar(bin).size; }, scratch.work);
    } else {  // with code that is there already
      rows_to_bins_by_plan(prepared.plan, tile, 1, A(1), scratch.bins, scratch.work);
      for (int64_t k = 0; k < x.bins(); ++k) magnitudes[k] += polar(scratch.bins[k]).size;
    }
    if ((group - first + 1) % kTermsInFloat == 0 || group + 1 == last) flush<A>(magnitudes, x.bins(), sums);
  }
}

// --- Over space ---

template <class A>
void pool_space(const IntensityArguments& x, const Prepared<A>& prepared, int64_t image, int64_t first, int64_t last,
                const IntensityScratch<A>& scratch, double* sums) {
  const int64_t channels = x.map.shape[1], in_tile = channels_in_tile<A>(x.map);
  for (int64_t group = first; group < last; ++group) {
    const int64_t channel = group * in_tile;
    const Block block{image, channel, min64(in_tile, channels - channel), 0, x.map.shape[2]};
    const int64_t lanes = padded<A>(block.channels);
    load_tile<A>(x.map, channels, block, scratch.tile, lanes);
    for (int64_t c = 0; c < lanes; c += kWidth<A>) {
      prepared.space.forward({scratch.tile + c, lanes}, A(1), scratch.bins, scratch.work);
      for (int64_t k = 0; k < x.bins(); ++k) scratch.magnitudes[k] += polar(scratch.bins[k]).size;
      if ((c / kWidth<A> + 1) % kTermsInFloat == 0 || c + kWidth<A> == lanes) {
        flush<A>(scratch.magnitudes, x.bins(), sums);
      }
    }
  }
}

// --- The interface ---

template <class A>
void run_as(const IntensityArguments& x, const void* tables, int64_t image, int64_t part, void* memory, double* sums) {
  const auto& prepared = *static_cast<const Prepared<A>*>(tables);
  const IntensityScratch<A> scratch(x, prepared, memory);
  for (int64_t k = 0; k < x.bins(); ++k) scratch.magnitudes[k] = Vector<A>{};
  const int64_t groups = groups_of<A>(x), parts = parts_of<A>(x);
  const auto pool = x.axis == Axis::channel ? pool_channels<A> : pool_space<A>;
  pool(x, prepared, image, part * groups / parts, (part + 1) * groups / parts, scratch, sums);
}

inline bool in_double(const IntensityArguments& x) { return x.map.dtype == DType::float64; }

std::shared_ptr<const void> prepare(const IntensityArguments& x) {
  if (in_double(x)) return std::make_shared<Prepared<double>>(x);
  return std::make_shared<Prepared<float>>(x);
}

int64_t parts(const IntensityArguments& x) { return in_double(x) ? parts_of<double>(x) : parts_of<float>(x); }

size_t scratch_bytes(const IntensityArguments& x, const void* tables) {
  if (in_double(x)) return IntensityScratch<double>(x, *static_cast<const Prepared<double>*>(tables), nullptr).bytes;
  return IntensityScratch<float>(x, *static_cast<const Prepared<float>*>(tables), nullptr).bytes;
}

void run(const IntensityArguments& x, const void* tables, int64_t image, int64_t part, void* scratch, double* sums) {
  (in_double(x) ? run_as<double> : run_as<float>)(x, tables, image, part, scratch, sums);
}

}  // namespace

extern const IntensityKernel intensity_kernel = {prepare, parts, scratch_bytes, run};

}  // namespace SKD_ISA
}  // namespace skd
