// Magnitudes of a map's Fourier transforms over space, pooled in one read of the map. Compiled once per instruction set
// (SKD_ISA).
//
// A lane is a channel: transforms side by side, which exchange nothing.
#include "cpu/half_spectrum.h"
#include "cpu/pooled_intensity.h"
#include "cpu/tile.h"
#include "cpu/vector_math.h"

namespace skd {
namespace SKD_ISA {
namespace {

// Channels of a tile: few, so that it and what it is read from stay in the second-level cache beside the next one's.
template <class A>
int64_t channels_in_tile(const Map& map) {
  constexpr int64_t kTileBytes = 25 << 10;
  const int64_t line = kLanes<A> * map.shape[2] * map.shape[3] * int64_t(sizeof(A));
  return kLanes<A> * min64(divide_up(map.shape[1], kLanes<A>), min64(16, max64(1, kTileBytes / line)));
}

template <class A>
int64_t tiles_of(const Map& map) {
  return divide_up(map.shape[1], channels_in_tile<A>(map));
}

template <class A>
struct SpaceScratch;

template <class A>
struct SpaceIntensity {
  typedef SpaceScratch<A> Scratch;

  HalfSpectrum<A> transform;

  SpaceIntensity(int64_t height, int64_t width) : transform(height, width) {}

  // Tiles of channels.
  static int64_t groups(const IntensityArguments& x, int64_t images) { return images * tiles_of<A>(x.map); }
  static int64_t parts(int64_t groups) { return min64(kMostParts, groups); }

  void add(const IntensityArguments& x, int64_t first_image, int64_t images, int64_t first, int64_t last,
           const Scratch& scratch, double* sums) const;
};

template <class A>
struct SpaceScratch {
  A* tile;
  Complex<Vector<A>>*bins, *column, *work;
  Part<A>* magnitudes;
  size_t bytes;

  SpaceScratch(const IntensityArguments& x, const SpaceIntensity<A>& pool, void* memory) {
    ScratchPieces pieces(memory);
    pieces.take(tile, x.map.shape[2] * x.map.shape[3] * channels_in_tile<A>(x.map));
    pieces.take(bins, x.bins());
    pieces.take(column, x.map.shape[2]);
    pieces.take(work, pool.transform.work());
    pieces.take(magnitudes, x.bins());
    bytes = pieces.bytes();
  }
};

template <class A>
void SpaceIntensity<A>::add(const IntensityArguments& x, int64_t first_image, int64_t, int64_t first, int64_t last,
                            const Scratch& scratch, double* sums) const {
  const int64_t channels = x.map.shape[1], in_tile = channels_in_tile<A>(x.map), height = transform.height();
  const int64_t tiles = tiles_of<A>(x.map);
  const auto block_of = [&](int64_t group) {
    const int64_t channel = group % tiles * in_tile;
    return Block{first_image + group / tiles, channel, min64(in_tile, channels - channel), 0, height};
  };
  for (int64_t group = first; group < last; ++group) {
    const Block block = block_of(group);
    const TileShape<A> shape = TileShape<A>::apart(padded<A>(block.channels), height * x.map.shape[3]);
    const BlockLanes<A> lanes = load_lanes<A>(x.map, channels, block, scratch.tile, shape);
    const int64_t vectors = divide_up(block.channels, kWidth<A>);
    Prefetcher prefetcher;  // of the next tile
    if (group + 1 < last) {
      prefetcher.add(x.map, channels, block_of(group + 1));
      prefetcher.divide(vectors * (height + transform.columns()));
    }
    for (int64_t v = 0; v < vectors; ++v) {
      transform.rows_forward(lanes[v], scratch.bins, scratch.work, prefetcher);
      for (int64_t k = 0; k < transform.columns(); ++k) {
        prefetcher.step();
        transform.column_forward(scratch.bins, k, scratch.column, scratch.work);
        Part<A>* const magnitudes = scratch.magnitudes + k * height;
        for (int64_t h = 0; h < transform.bins_in_column(k); ++h)
          magnitudes[h] += folded<A>(Functions<Vector<A>>::magnitude(scratch.column[h]));
      }
      if ((v + 1) % kTermsInFloat == 0 || v + 1 == vectors) transform.move_sums(scratch.magnitudes, 1, sums);
    }
  }
}

}  // namespace

// A constant: at the time of loading nothing may run that the processor may lack.
constexpr IntensityKernel space_intensity_kernel = PooledIntensity<SpaceIntensity>::kernel();

}  // namespace SKD_ISA
}  // namespace skd
