// Magnitudes of a map's Fourier transforms over channels, pooled in one read of the map. Compiled once per instruction
// set (SKD_ISA).
//
// A lane is a position: transforms side by side, which exchange nothing. Arithmetic per number, of 384 channels: about
// 11 operations of a real transform and half a magnitude, about 8.

// Vectors have 8 lanes with AVX-512 too. With 16 this took 1.3 to 1.5 times as long on Zen 4 for planes of 14x14: every
// load crosses a cache line then, more positions are left over at the ends, and a root takes longer.
#undef SKD_AVX512
#define SKD_AVX512 0

#include <optional>

#include "cpu/channel_spectrum.h"
#include "cpu/pooled_intensity.h"
#include "cpu/position_vectors.h"
#include "cpu/range_flags.h"
#include "cpu/vector_math.h"

namespace skd {
namespace SKD_ISA {
namespace {

template <class A>
struct ChannelScratch;

template <class A>
struct ChannelIntensity {
  typedef ChannelScratch<A> Scratch;

  FftTables<A> tables;
  FftPlan<A> plan;
  std::optional<ChannelSpectrum> spectrum;  // the fast way, if there is one

  ChannelIntensity(int64_t channels, int64_t) : tables(int(channels), FftKind::real), plan(tables.plan()) {
    const bool fast = sizeof(A) == sizeof(float) && ChannelSpectrum::serves(channels) && RangeFlags::work();
    if (fast) spectrum.emplace(int(channels));
  }
  int64_t work() const { return spectrum ? max64(plan.work, spectrum->work()) : plan.work; }

  // Vectors of positions.
  static int64_t groups(const IntensityArguments& x, int64_t images) {
    return PositionVectors<A>(x.map, 0, images).count();
  }
  static int64_t parts(int64_t groups) { return min64(kMostParts, divide_up(groups, kTermsInFloat)); }

  void add(const IntensityArguments& x, int64_t first_image, int64_t images, int64_t first, int64_t last,
           const Scratch& scratch, double* sums) const;
};

template <class A>
struct ChannelScratch {
  A *tile, *kept;
  Complex<Vector<A>>* work;
  Vector<A>* magnitudes;
  size_t bytes;

  ChannelScratch(const IntensityArguments& x, const ChannelIntensity<A>& pool, void* memory) {
    ScratchPieces pieces(memory);
    pieces.take(tile, x.map.shape[1] * kWidth<A>);
    pieces.take(kept, x.map.shape[1] * kWidth<A>);
    pieces.take(work, pool.work());
    pieces.take(magnitudes, x.bins());
    bytes = pieces.bytes();
  }
};

// Vectors [begin, end) of positions are added to the magnitudes of a scratch, in calls that go through all from `first`
// on.
struct Range {
  int64_t first, begin, end;
};

// --- The ends of planes ---

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

// --- For any number of channels ---

template <class A, class Load>
void add_transform(const FftPlan<A>& plan, Load load, typename PositionVectors<A>::Ahead ahead,
                   const ChannelScratch<A>& scratch) {
  typedef Vector<A> V;
  V* const magnitudes = scratch.magnitudes;
  fft_real_forward(
      plan, load,
      [&](int k, Complex<V> bin) SKD_INLINED {
        ahead.fetch();
        magnitudes[k] += Functions<V>::magnitude(bin);
      },
      scratch.work);
}

// For numbers of any size, in order of the bins. Where it takes up what add_fast failed at, it leaves alone what that
// has kept of the ends of planes.
template <class A>
void add_any(const ChannelIntensity<A>& pool, const PositionVectors<A>& vectors, const Map& map, Range range,
             const ChannelScratch<A>& scratch) {
  const bool keeps = !pool.spectrum;
  for (int64_t v = range.begin; v < range.end; ++v) {
    const auto ahead = vectors.ahead(v);
    if constexpr (sizeof(A) == sizeof(float)) {
      if (map.dtype == DType::float32 && vectors.is_contiguous(v)) {
        const float* const p = vectors.template contiguous<float>(v);
        const int64_t stride = map.stride[1];
        const auto load = [&](int c) SKD_INLINED { return Access<float, float>::load(p + c * stride); };
        add_transform(pool.plan, load, ahead, scratch);
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
    add_transform(
        pool.plan, [&](int c) SKD_INLINED { return Access<A, A>::load(scratch.tile + c * kWidth<A>); }, ahead, scratch);
    if (keeps) keep_rest(vectors, map, v, scratch.kept);
  }
}

// Moves the sums of a few vectors to where they do not drift.
template <class A>
void flush_any(Vector<A>* magnitudes, int64_t bins, double* sums) {
  for (int64_t k = 0; k < bins; ++k) sums[k] += sum_of_lanes(magnitudes[k]);
  clear(magnitudes, bins);
}

// --- For numbers of channels that have a spectrum ---

// The first pass over a vector of positions, from where they are if that can be done.
inline void first_pass(const ChannelSpectrum& spectrum, const PositionVectors<float>& vectors, const Map& map,
                       int64_t v, int64_t first, const ChannelScratch<float>& scratch) {
  constexpr int n = kWidth<float>;
  if (map.dtype == DType::float32 && vectors.is_contiguous(v)) {
    const ColumnsOfPlanes columns(vectors.contiguous<float>(v), map.stride[1], spectrum);
    return spectrum.first_pass(columns, scratch.work);
  }
  const float* lane[n];
  int used = 0;  // of the lanes, if each has its channels side by side
  if (vectors.order() == Order::planes && !vectors.is_contiguous(v)) {
    used = lanes_of_rest(vectors, map, v, first, scratch.kept, lane);
  } else if (vectors.order() == Order::channels && map.dtype == DType::float32) {
    used = vectors.lanes<float>(v, lane);
  }
  if (used == n) return spectrum.first_pass(ColumnsOfLanes(lane), scratch.work);
  if (used > 0) {
    PositionVectors<float>::load_rows(lane, used, map.shape[1], scratch.tile);
  } else {
    SKD_FOR_DTYPE(map.dtype, T, vectors.load<T>(v, scratch.tile);)
  }
  spectrum.first_pass(ColumnsOfTile{scratch.tile}, scratch.work);
}

// For numbers whose squares are neither too small nor too large (RangeFlags), in the order of the spectrum.
inline void add_fast(const ChannelSpectrum& spectrum, const PositionVectors<float>& vectors, const Map& map,
                     Range range, const ChannelScratch<float>& scratch) {
  typedef Vector<float> V;
  for (int64_t v = range.begin; v < range.end; ++v) {
    first_pass(spectrum, vectors, map, v, range.first, scratch);
    keep_rest(vectors, map, v, scratch.kept);
    // Fetched in the second pass alone, one at a time: the first waits for lines of its own, from the second level.
    auto ahead = vectors.ahead(v);
    V* magnitude = scratch.magnitudes;
    spectrum.second_pass(scratch.work, [&](Complex<V> x) SKD_INLINED {
      ahead.fetch();
      *magnitude++ += Functions<V>::square_root(x.re * x.re + x.im * x.im);
    });
  }
}

// As flush_any, after add_fast: lanes are added in pairs first, which is no long sum and does not leave the range of
// these magnitudes. Number i is that of bin[i].
inline void flush_fast(Vector<float>* magnitudes, const std::vector<int>& bin, double* sums) {
  constexpr size_t n = kWidth<float>;
  size_t i = 0;
  for (; i + n <= bin.size(); i += n) {
    const Vector<float> sum = sums_of_lanes<float>(magnitudes + i);
    for (size_t lane = 0; lane < n; ++lane) sums[bin[i + lane]] += double(sum[lane]);
  }
  for (; i < bin.size(); ++i) sums[bin[i]] += sum_of_lanes(magnitudes[i]);
  clear(magnitudes, int64_t(bin.size()));
}

// --- The interface ---

template <class A>
void ChannelIntensity<A>::add(const IntensityArguments& x, int64_t first_image, int64_t images, int64_t first,
                              int64_t last, const Scratch& scratch, double* sums) const {
  const PositionVectors<A> vectors(x.map, first_image, images);
  RangeFlags flags;
  for (int64_t begin = first; begin < last; begin += kTermsInFloat) {
    const Range range{first, begin, min64(last, begin + kTermsInFloat)};
    if constexpr (sizeof(A) == sizeof(float)) {
      if (spectrum) {
        flags.clear();
        add_fast(*spectrum, vectors, x.map, range, scratch);
        if (!flags.raised()) {
          flush_fast(scratch.magnitudes, spectrum->bins(), sums);
          continue;
        }
        clear(scratch.magnitudes, x.bins());  // once more, the other way
      }
    }
    add_any(*this, vectors, x.map, range, scratch);
    flush_any<A>(scratch.magnitudes, x.bins(), sums);
  }
}

}  // namespace

// A constant: at the time of loading nothing may run that the processor may lack.
constexpr IntensityKernel channel_intensity_kernel = PooledIntensity<ChannelIntensity>::kernel();

}  // namespace SKD_ISA
}  // namespace skd
