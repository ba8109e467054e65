// Magnitudes of a map's Fourier transforms over channels or space, pooled in one read of the map. Compiled once per
// instruction set (SKD_ISA).
//
// Over channels a lane is a position, over space a channel: transforms side by side, which exchange nothing. Arithmetic
// per number, over 384 channels: about 11 operations of a real transform and half a magnitude, about 8.
#include "cpu/spectral_intensity.h"

#include <optional>

#include "cpu/channel_spectrum.h"
#include "cpu/half_spectrum.h"
#include "cpu/position_vectors.h"
#include "cpu/range_flags.h"
#include "cpu/scratch.h"
#include "cpu/tile.h"
#include "cpu/vector_math.h"

namespace skd {
namespace SKD_ISA {
namespace {

constexpr int64_t kMostParts = 16;  // each with sums of its own

// What one shape needs, of the two axes one.
template <class A>
struct Prepared {
  std::optional<FftTables<A>> channels;
  std::optional<ChannelSpectrum> spectrum;  // the fast way over channels, if there is one
  std::optional<HalfSpectrum<A>> space;
  FftPlan<A> plan{};  // over channels

  explicit Prepared(const IntensityArguments& x) {
    if (x.axis == Axis::channel) {
      channels.emplace(int(x.map.shape[1]), FftKind::real);
      plan = channels->plan();
      const bool fast = sizeof(A) == sizeof(float) && ChannelSpectrum::serves(plan.length) && RangeFlags::work();
      if (fast) spectrum.emplace(plan.length);
    } else {
      space.emplace(x.map.shape[2], x.map.shape[3]);
    }
  }
  int64_t work() const {
    if (space) return space->work();
    return spectrum ? max64(plan.work, spectrum->work()) : plan.work;
  }
};

// Channels of a tile, of the transform over space.
template <class A>
int64_t channels_in_tile(const Map& map) {
  constexpr int64_t kTileBytes = 128 << 10;
  const int64_t line = kLanes<A> * map.shape[2] * map.shape[3] * int64_t(sizeof(A));
  return kLanes<A> * min64(divide_up(map.shape[1], kLanes<A>), min64(16, max64(1, kTileBytes / line)));
}

template <class A>
int64_t tiles_of(const Map& map) {
  return divide_up(map.shape[1], channels_in_tile<A>(map));
}

// Vectors of positions, or tiles of channels.
template <class A>
int64_t groups_of(const IntensityArguments& x, int64_t images) {
  return x.axis == Axis::channel ? PositionVectors<A>(x.map, 0, images).count() : images * tiles_of<A>(x.map);
}

template <class A>
int64_t parts_of(const IntensityArguments& x, int64_t images) {
  const int64_t groups = groups_of<A>(x, images);
  return min64(kMostParts, x.axis == Axis::channel ? divide_up(groups, kTermsInFloat) : groups);
}

template <class A>
struct IntensityScratch {
  A *tile, *kept;
  Complex<Vector<A>>*bins, *column, *work;
  Vector<A>* magnitudes;
  size_t bytes;

  IntensityScratch(const IntensityArguments& x, const Prepared<A>& prepared, void* memory) {
    const int64_t in_space = x.map.shape[2] * x.map.shape[3] * channels_in_tile<A>(x.map);
    ScratchPieces pieces(memory);
    const bool of_channels = x.axis == Axis::channel;
    pieces.take(tile, of_channels ? x.map.shape[1] * kWidth<A> : in_space);
    pieces.take(kept, of_channels ? x.map.shape[1] * kWidth<A> : 0);
    pieces.take(bins, of_channels ? 0 : x.bins());
    pieces.take(column, of_channels ? 0 : x.map.shape[2]);
    pieces.take(work, prepared.work());
    pieces.take(magnitudes, x.bins());
    bytes = pieces.bytes();
  }
};

template <class A>
void clear(Vector<A>* magnitudes, int64_t bins) {
  for (int64_t k = 0; k < bins; ++k) magnitudes[k] = Vector<A>{};
}

// --- Over channels ---

// Vectors [begin, end) of positions are added to the magnitudes of `scratch`, in calls that go through all from `first`
// on.
struct Range {
  int64_t first, begin, end;
};

// What planes leave over: its lanes have their channels side by side. Returns how many of them are not idle.
template <class A>
int lanes_of_rest(const PositionVectors<A>& vectors, const Map& map, int64_t v, int64_t first, A* kept,
                  const A** lane) {
  int used = 0;
  SKD_FOR_DTYPE(map.dtype, T, used = vectors.template complete_rest<T>(v, first, kept);)
  for (int i = 0; i < kWidth<A>; ++i) lane[i] = kept + i * map.shape[1];
  return used;
}

template <class A>
void keep_rest(const PositionVectors<A>& vectors, const Map& map, int64_t v, A* kept) {
  if (vectors.order() == Order::planes) SKD_FOR_DTYPE(map.dtype, T, vectors.template keep_rest<T>(v, kept);)
}

template <class A, class Load>
void add_transform(const FftPlan<A>& plan, Load load, typename PositionVectors<A>::Ahead ahead,
                   const IntensityScratch<A>& scratch) {
  typedef Vector<A> V;
  V* const magnitudes = scratch.magnitudes;
  fft_real_forward(
      plan, load,
      [&](int k, Complex<V> bin) SKD_INLINED {
        ahead.fetch(1);
        magnitudes[k] += Functions<V>::magnitude(bin);
      },
      scratch.work);
}

// For any number of channels and for numbers of any size, in order of the bins. Where it takes up what add_fast failed
// at, it leaves alone what that has kept of the ends of planes.
template <class A>
void add_any(const Prepared<A>& prepared, const PositionVectors<A>& vectors, const Map& map, Range range,
             const IntensityScratch<A>& scratch) {
  const bool keeps = !prepared.spectrum;
  const TileLanes<A> tile{scratch.tile};
  for (int64_t v = range.begin; v < range.end; ++v) {
    const auto ahead = vectors.ahead(v);
    if constexpr (sizeof(A) == sizeof(float)) {
      if (map.dtype == DType::float32 && vectors.is_contiguous(v)) {
        const float* const p = vectors.template contiguous<float>(v);
        const int64_t stride = map.stride[1];
        const auto load = [&](int c) SKD_INLINED { return Access<float, float>::load(p + c * stride); };
        add_transform(prepared.plan, load, ahead, scratch);
        if (keeps) keep_rest(vectors, map, v, scratch.kept);
        continue;
      }
    }
    if (keeps && vectors.order() == Order::planes && !vectors.is_contiguous(v)) {
      const A* lane[kWidth<A>];
      const int used = lanes_of_rest(vectors, map, v, range.first, scratch.kept, lane);
      vectors.load_rows(lane, used, map.shape[1], scratch.tile);
    } else {
      SKD_FOR_DTYPE(map.dtype, T, vectors.template load<T>(v, scratch.tile);)
    }
    add_transform(prepared.plan, [&](int c) SKD_INLINED { return tile.load(c); }, ahead, scratch);
    if (keeps) keep_rest(vectors, map, v, scratch.kept);
  }
}

// The first pass over a vector of positions, from where they are if that can be done.
inline void first_pass(const ChannelSpectrum& spectrum, const PositionVectors<float>& vectors, const Map& map,
                       int64_t v, int64_t first, PositionVectors<float>::Ahead& ahead,
                       const IntensityScratch<float>& scratch) {
  constexpr int n = kWidth<float>;
  if (map.dtype == DType::float32 && vectors.is_contiguous(v)) {
    const ColumnsOfPlanes columns(vectors.contiguous<float>(v), map.stride[1], spectrum);
    return spectrum.first_pass(columns, scratch.work, ahead);
  }
  const float* lane[n];
  int used = 0;  // of the lanes, if each has its channels side by side
  if (vectors.order() == Order::planes && !vectors.is_contiguous(v)) {
    used = lanes_of_rest(vectors, map, v, first, scratch.kept, lane);
  } else if (vectors.order() == Order::channels && map.dtype == DType::float32) {
    used = vectors.lanes<float>(v, lane);
  }
  if (used == n && n <= 8) return spectrum.first_pass(ColumnsOfLanes(lane), scratch.work, ahead);
  if (used > 0) {
    PositionVectors<float>::load_rows(lane, used, map.shape[1], scratch.tile);
  } else {
    SKD_FOR_DTYPE(map.dtype, T, vectors.load<T>(v, scratch.tile);)
  }
  spectrum.first_pass(ColumnsOfTile{scratch.tile}, scratch.work, ahead);
}

// For numbers whose squares are neither too small nor too large (RangeFlags), in the order of the spectrum.
inline void add_fast(const ChannelSpectrum& spectrum, const PositionVectors<float>& vectors, const Map& map,
                     Range range, const IntensityScratch<float>& scratch) {
  typedef Vector<float> V;
  for (int64_t v = range.begin; v < range.end; ++v) {
    auto ahead = vectors.ahead(v);
    first_pass(spectrum, vectors, map, v, range.first, ahead, scratch);
    keep_rest(vectors, map, v, scratch.kept);
    V* magnitude = scratch.magnitudes;
    spectrum.second_pass(
        scratch.work,
        [&](Complex<V> x) SKD_INLINED { *magnitude++ += Functions<V>::square_root(x.re * x.re + x.im * x.im); }, ahead);
  }
}

// Moves the sums of a few vectors to where they do not drift.
template <class A>
void flush_any(Vector<A>* magnitudes, int64_t bins, double* sums) {
  for (int64_t k = 0; k < bins; ++k) sums[k] += sum_of_lanes<A>(magnitudes[k]);
  clear<A>(magnitudes, bins);
}

// The same after add_fast: lanes are added in pairs first, which is no long sum and does not leave the range of these
// magnitudes. Number i is that of bin[i].
inline void flush_fast(Vector<float>* magnitudes, const std::vector<int>& bin, double* sums) {
  constexpr size_t n = kWidth<float>;
  size_t i = 0;
  for (; i + n <= bin.size(); i += n) {
    const Vector<float> sum = sums_of_lanes<float>(magnitudes + i);
    for (size_t lane = 0; lane < n; ++lane) sums[bin[i + lane]] += double(sum[lane]);
  }
  for (; i < bin.size(); ++i) sums[bin[i]] += sum_of_lanes<float>(magnitudes[i]);
  clear<float>(magnitudes, int64_t(bin.size()));
}

template <class A>
void pool_channels(const IntensityArguments& x, const Prepared<A>& prepared, int64_t first_image, int64_t images,
                   int64_t first, int64_t last, const IntensityScratch<A>& scratch, double* sums) {
  const PositionVectors<A> vectors(x.map, first_image, images);
  RangeFlags flags;
  for (int64_t begin = first; begin < last; begin += kTermsInFloat) {
    const Range range{first, begin, min64(last, begin + kTermsInFloat)};
    if constexpr (sizeof(A) == sizeof(float)) {
      if (prepared.spectrum) {
        flags.clear();
        add_fast(*prepared.spectrum, vectors, x.map, range, scratch);
        if (!flags.raised()) {
          flush_fast(scratch.magnitudes, prepared.spectrum->bins(), sums);
          continue;
        }
        clear<A>(scratch.magnitudes, x.bins());  // once more, the other way
      }
    }
    add_any(prepared, vectors, x.map, range, scratch);
    flush_any<A>(scratch.magnitudes, x.bins(), sums);
  }
}

// --- Over space ---

// As flush_any, of [columns][height] to [height][columns].
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
void pool_space(const IntensityArguments& x, const Prepared<A>& prepared, int64_t first_image, int64_t, int64_t first,
                int64_t last, const IntensityScratch<A>& scratch, double* sums) {
  const HalfSpectrum<A>& transform = *prepared.space;
  const int64_t channels = x.map.shape[1], in_tile = channels_in_tile<A>(x.map), height = transform.height();
  const int64_t tiles = tiles_of<A>(x.map);
  Prefetcher prefetcher;
  for (int64_t group = first; group < last; ++group) {
    const int64_t image = first_image + group / tiles, channel = group % tiles * in_tile;
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
void run_as(const IntensityArguments& x, const void* tables, int64_t first_image, int64_t images, int64_t part,
            void* memory, double* sums) {
  const auto& prepared = *static_cast<const Prepared<A>*>(tables);
  const IntensityScratch<A> scratch(x, prepared, memory);
  clear<A>(scratch.magnitudes, x.bins());
  const int64_t groups = groups_of<A>(x, images), parts = parts_of<A>(x, images);
  const auto pool = x.axis == Axis::channel ? pool_channels<A> : pool_space<A>;
  pool(x, prepared, first_image, images, part * groups / parts, (part + 1) * groups / parts, scratch, sums);
}

inline bool in_double(const IntensityArguments& x) { return x.map.dtype == DType::float64; }

std::shared_ptr<const void> prepare_anew(const IntensityArguments& x) {
  if (in_double(x)) return std::make_shared<Prepared<double>>(x);
  return std::make_shared<Prepared<float>>(x);
}

// That of a thread's last few shapes is kept: the roots of unity take as long as several transforms.
std::shared_ptr<const void> prepare(const IntensityArguments& x) {
  struct Kept {
    Axis axis;
    bool in_double;
    int64_t size[2];
    std::shared_ptr<const void> prepared;
  };
  thread_local Kept kept[8];
  thread_local int next = 0;
  const bool over_channels = x.axis == Axis::channel;
  const int64_t size[2] = {x.map.shape[over_channels ? 1 : 2], over_channels ? 1 : x.map.shape[3]};
  for (const Kept& one : kept) {
    if (one.prepared && one.axis == x.axis && one.in_double == in_double(x) && one.size[0] == size[0] &&
        one.size[1] == size[1]) {
      return one.prepared;
    }
  }
  Kept& oldest = kept[next];
  oldest = {x.axis, in_double(x), {size[0], size[1]}, prepare_anew(x)};
  next = (next + 1) % 8;
  return oldest.prepared;
}

int64_t parts(const IntensityArguments& x, int64_t images) {
  return in_double(x) ? parts_of<double>(x, images) : parts_of<float>(x, images);
}

size_t scratch_bytes(const IntensityArguments& x, const void* tables) {
  if (in_double(x)) return IntensityScratch<double>(x, *static_cast<const Prepared<double>*>(tables), nullptr).bytes;
  return IntensityScratch<float>(x, *static_cast<const Prepared<float>*>(tables), nullptr).bytes;
}

void run(const IntensityArguments& x, const void* tables, int64_t first_image, int64_t images, int64_t part,
         void* scratch, double* sums) {
  (in_double(x) ? run_as<double> : run_as<float>)(x, tables, first_image, images, part, scratch, sums);
}

}  // namespace

extern const IntensityKernel intensity_kernel = {prepare, parts, scratch_bytes, run};

}  // namespace SKD_ISA
}  // namespace skd
