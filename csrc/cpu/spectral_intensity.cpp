// Magnitudes of a map's Fourier transforms over channels or space, pooled in one read of the map. Compiled once per
// instruction set (SKD_ISA).
//
// Over channels a lane is a position, over space a channel: transforms side by side, which exchange nothing. Arithmetic
// per number, over 384 channels: about 11 operations of a real transform and half a magnitude, about 8.
#include "cpu/spectral_intensity.h"

#include <optional>

#include "cpu/half_spectrum.h"
#include "cpu/scratch.h"
#include "cpu/tile.h"
#include "cpu/vector_math.h"

namespace skd {
namespace SKD_ISA {
namespace {

constexpr int64_t kMostParts = 4;  // of an image, each with sums of its own

// One of the two.
template <class A>
struct Prepared {
  std::optional<FftTables<A>> channels;
  std::optional<HalfSpectrum<A>> space;
  FftPlan<A> plan{};  // over channels

  explicit Prepared(const IntensityArguments& x) {
    if (x.axis == Axis::channel) {
      channels.emplace(int(x.map.shape[1]), FftKind::real);
      plan = channels->plan();
    } else {
      space.emplace(x.map.shape[2], x.map.shape[3]);
    }
  }
  int64_t work() const { return space ? space->work() : plan.work; }
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
  Complex<Vector<A>>*bins, *column, *work;
  Vector<A>* magnitudes;
  size_t bytes;

  IntensityScratch(const IntensityArguments& x, const Prepared<A>& prepared, void* memory) {
    const int64_t in_space = x.map.shape[2] * x.map.shape[3] * channels_in_tile<A>(x.map);
    ScratchPieces pieces(memory);
    pieces.take(tile, x.axis == Axis::channel ? x.map.shape[1] * kWidth<A> : in_space);
    pieces.take(bins, x.bins());
    pieces.take(column, x.axis == Axis::channel ? 0 : x.map.shape[2]);
    pieces.take(work, prepared.work());
    pieces.take(magnitudes, x.bins());
    bytes = pieces.bytes();
  }
};

// Moves the sums of a few vectors to where they do not drift.
template <class A>
void flush(Vector<A>* magnitudes, int64_t bins, double* sums) {
  for (int64_t k = 0; k < bins; ++k) {
    sums[k] += sum_of_lanes<A>(magnitudes[k]);
    magnitudes[k] = Vector<A>{};
  }
}

// --- Over channels ---

// All channels of the vector of positions that begins at `position`, one vector per channel. Where there are no more,
// it begins earlier, and what belongs to the one before is zeros.
template <class A, class T>
void load_positions(const Map& map, int64_t image, int64_t position, A* tile) {
  constexpr int n = kWidth<A>;
  const int64_t columns = map.shape[3], positions = map.shape[2] * columns, channels = map.shape[1];
  const int64_t count = min64(n, positions - position), skipped = n - count, first = position - skipped;
  const T* base = at<T>(map, image, 0, 0);
  const Order order = order_of(map);
  if (order == Order::planes && first >= 0) {
    typedef typename VectorOf<A>::index Bits;
    Bits kept;
    for (int i = 0; i < n; ++i) kept[i] = i < skipped ? 0 : -1;
    const T* p = base + first;
    for (int64_t c = 0; c < channels; ++c, p += map.stride[1]) {
      Access<A, A>::store(tile + c * n, bit_cast<Vector<A>>(bit_cast<Bits>(Access<A, T>::load(p)) & kept));
    }
    return;
  }
  const T* row[n];
  for (int i = 0; i < n; ++i) {
    const int64_t p = max64(first + i, 0);
    row[i] = base + p / columns * map.stride[2] + p % columns * map.stride[3];
  }
  int64_t c = 0;
  if (order == Order::channels) {
    for (; c + n <= channels; c += n) {
      Vector<A> block[n];
      for (int i = 0; i < n; ++i) block[i] = i < skipped ? Vector<A>{} : Access<A, T>::load(row[i] + c);
      transpose<A>(block);
      for (int i = 0; i < n; ++i) Access<A, A>::store(tile + (c + i) * n, block[i]);
    }
  }
  for (; c < channels; ++c) {
    for (int i = 0; i < n; ++i) tile[c * n + i] = i < skipped ? A(0) : A(to_float(row[i][c * map.stride[1]]));
  }
}

// Whether the vectors of a group lie in the map as the transform wants them.
template <class A>
bool is_readable(const Map& map, int64_t group) {
  return sizeof(A) == sizeof(float) && map.dtype == DType::float32 && order_of(map) == Order::planes &&
         (group + 1) * kWidth<A> <= map.shape[2] * map.shape[3];
}

// Memory that is wanted later, fetched while a group is transformed: a line, or part of one, for every bin (with 16
// lanes the other half of two).
struct Ahead {
  uintptr_t at;
  int64_t step;
};

// Token maps want the next group's rows. Planes want a stretch of the next image: one piece of memory, where the few
// numbers that the next group has in each plane would take a line for each.
template <class A>
Ahead memory_ahead(const Map& map, int64_t image, int64_t group) {
  const int64_t size = bytes_of(map.dtype), columns = map.shape[3], next = (group + 1) * kWidth<A>;
  const int64_t step = 2 * kWidth<A> * size;  // two numbers of every lane make a bin
  const uintptr_t start = uintptr_t(map.data) + image * map.stride[0] * size, next_image = start + map.stride[0] * size;
  if (order_of(map) == Order::channels && next < map.shape[2] * columns) {
    return {start + (next / columns * map.stride[2] + next % columns * map.stride[3]) * size, step};
  }
  if (image + 1 == map.shape[0]) return {start, 0};
  return {order_of(map) == Order::channels ? next_image : next_image + group * map.shape[1] * step / 2, step};
}

// Adds up the magnitudes of a group; load(c) is its vector of channel c.
template <class Load>
void add_magnitudes(const Prepared<float>& prepared, Load load, const IntensityScratch<float>& scratch, Ahead ahead) {
  typedef Vector<float> V;
  V* const magnitudes = scratch.magnitudes;
  fft_real_forward(
      prepared.plan, load,
      [&](int k, Complex<V> bin) SKD_INLINED {
        __builtin_prefetch(reinterpret_cast<const void*>(ahead.at));
        ahead.at += ahead.step;
        magnitudes[k] += Functions<V>::magnitude(bin);
      },
      scratch.work);
}

template <class A>
void pool_channels(const IntensityArguments& x, const Prepared<A>& prepared, int64_t image, int64_t first, int64_t last,
                   const IntensityScratch<A>& scratch, double* sums) {
  const TileLanes<A> tile{scratch.tile};
  Vector<A>* const magnitudes = scratch.magnitudes;
  for (int64_t group = first; group < last; ++group) {
    const int64_t position = group * kWidth<A>;
    if (is_readable<A>(x.map, group)) {
      if constexpr (sizeof(A) == sizeof(float)) {
        const float* const p = at<float>(x.map, image, 0, 0) + position;
        const int64_t stride = x.map.stride[1];
        const auto load = [&](int c) SKD_INLINED {
          __builtin_prefetch(p + c * stride + 2 * kWidth<A>);  // into the first level
          return Access<A, float>::load(p + c * stride);
        };
        add_magnitudes(prepared, load, scratch, memory_ahead<A>(x.map, image, group));
      }
    } else {
      SKD_FOR_DTYPE(x.map.dtype, T, load_positions<A, T>(x.map, image, position, scratch.tile);)
      if constexpr (sizeof(A) == sizeof(float)) {
        const auto load = [&](int c) SKD_INLINED { return tile.load(c); };
        add_magnitudes(prepared, load, scratch, memory_ahead<A>(x.map, image, group));
      } else {  // with code that is there already
        Prefetcher idle;
        rows_to_bins_by_plan(prepared.plan, tile, 1, scratch.bins, scratch.work, idle);
        for (int64_t k = 0; k < x.bins(); ++k) magnitudes[k] += polar(scratch.bins[k]).size;
      }
    }
    if ((group - first + 1) % kTermsInFloat == 0 || group + 1 == last) flush<A>(magnitudes, x.bins(), sums);
  }
}

// --- Over space ---

// As flush, of [columns][height] to [height][columns].
template <class A>
void flush_columns(const HalfSpectrum<A>& transform, Vector<A>* magnitudes, double* sums) {
  const int64_t height = transform.height(), columns = transform.columns();
  for (int64_t k = 0; k < columns; ++k, magnitudes += height) {
    for (int64_t h = 0; h < transform.bins_in_column(k); ++h) {
      const double magnitude = sum_of_lanes<A>(magnitudes[h]);
      sums[h * columns + k] += magnitude;
      if (transform.is_halved(k) && is_inner(int(h), int(height))) sums[(height - h) * columns + k] += magnitude;
      magnitudes[h] = Vector<A>{};
    }
  }
}

template <class A>
void pool_space(const IntensityArguments& x, const Prepared<A>& prepared, int64_t image, int64_t first, int64_t last,
                const IntensityScratch<A>& scratch, double* sums) {
  const HalfSpectrum<A>& transform = *prepared.space;
  const int64_t channels = x.map.shape[1], in_tile = channels_in_tile<A>(x.map), height = transform.height();
  Prefetcher prefetcher;
  for (int64_t group = first; group < last; ++group) {
    const int64_t channel = group * in_tile;
    const Block block{image, channel, min64(in_tile, channels - channel), 0, height};
    const TileShape<A> shape = TileShape<A>::apart(padded<A>(block.channels), height * x.map.shape[3]);
    load_tile<A>(x.map, channels, block, scratch.tile, shape);
    const int64_t vectors = shape.lanes / kWidth<A>;
    for (int64_t v = 0; v < vectors; ++v) {
      transform.rows_forward({scratch.tile + v * shape.vector}, scratch.bins, scratch.work, prefetcher);
      for (int64_t k = 0; k < transform.columns(); ++k) {
        transform.column_forward(scratch.bins, k, scratch.column, scratch.work);
        Vector<A>* const magnitudes = scratch.magnitudes + k * height;
        for (int64_t h = 0; h < transform.bins_in_column(k); ++h)
          magnitudes[h] += Functions<Vector<A>>::magnitude(scratch.column[h]);
      }
      if ((v + 1) % kTermsInFloat == 0 || v + 1 == vectors) flush_columns<A>(transform, scratch.magnitudes, sums);
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
