// Losses on half spectra, their gradients and the pooled magnitudes in one pass over both maps. Compiled once per
// instruction set (SKD_ISA).
//
// Bytes: both maps read once, the gradient written once. Arithmetic per number of the student, at 14x14: two real
// transforms (of student and teacher) and one adjoint, about 13 operations each, and half a bin's comparison, about 30.
// A lane is a plane; a vector of planes goes through all steps in the first-level cache.
#include "cpu/fourier_align.h"

#include <vector>

#include "cpu/align_planes.h"
#include "cpu/half_spectrum.h"
#include "cpu/vector_math.h"

namespace skd {
namespace SKD_ISA {
namespace {

constexpr int64_t kTileBytes = 64 << 10;  // a map's, within the second-level cache, with room for the next one's memory
constexpr int64_t kUnitsInItem = 8;
constexpr int64_t kFewItems = 16;   // that are still enough for many threads
constexpr int64_t kMostItems = 64;  // of a layer with spectra: each keeps sums of its own

template <class A>
struct Prepared {
  HalfSpectrum<A> transform;
  std::vector<A> weights;  // of the bins: the bands and the inner columns' weight

  explicit Prepared(const FourierArguments& layer) : transform(layer.student.shape[2], layer.student.shape[3]) {
    const int64_t columns = layer.student.shape[3], bins = columns / 2 + 1;
    for (int64_t i = 0; i < transform.size(); ++i) {
      const A band = layer.bands != nullptr ? reinterpret_cast<const A*>(layer.bands)[i] : A(1);
      weights.push_back(is_inner(int(i % bins), int(columns)) ? band * A(layer.inner_weight) : band);
    }
  }
};

// --- How a layer is cut up ---

// A unit is a block of channels of one image; an item some units.
template <class A>
struct FourierCut {
  int64_t width;     // pooled channels
  int64_t channels;  // in a block, at most; a multiple of kLanes
  int64_t blocks;    // in an image
  int64_t units, items;

  explicit FourierCut(const FourierArguments& layer) {
    const int64_t* n = layer.student.shape;
    width = min64(n[1], layer.teacher.shape[1]);
    const int64_t lines = divide_up(width, kLanes<A>);
    const int64_t line = kLanes<A> * n[2] * n[3] * int64_t(sizeof(A));
    // A gradient that is spread over windows of the student's channels needs all of these at once.
    const int64_t most = n[1] > width ? lines : min64(8, max64(1, kTileBytes / line));
    channels = kLanes<A> * divide_up(lines, divide_up(lines, most));
    blocks = divide_up(width, channels);
    units = n[0] * blocks;
    items = max64(min64(units, kFewItems), divide_up(units, kUnitsInItem));
    if (layer.spectra != nullptr) items = min64(items, kMostItems);
  }
};

// Scratch memory: tiles of both maps and of transposed planes, then what a vector of planes needs.
template <class A>
struct FourierScratch {
  typedef Complex<Vector<A>> Bin;
  A *student, *teacher, *planes;
  Bin *s, *t, *work;
  Vector<A>* magnitudes[2];  // sums of the student's and of the teacher's over the vectors of a block
  size_t bytes;

  FourierScratch(const FourierArguments& layer, const FourierCut<A>& cut, const HalfSpectrum<A>& transform,
                 void* memory) {
    const int64_t positions = layer.student.shape[2] * layer.student.shape[3], bins = transform.size();
    char* at = static_cast<char*>(memory);
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(at);
      at += (size_t(count) * sizeof(*pointer) + 63) / 64 * 64;
    };
    take(student, positions * cut.channels);
    take(teacher, positions * cut.channels);
    take(planes, positions * cut.channels + kLanes<A>);
    take(s, bins);
    take(t, bins);
    take(work, transform.work());
    take(magnitudes[0], bins);
    take(magnitudes[1], bins);
    bytes = size_t(at - static_cast<char*>(memory));
  }
};

// --- A vector of planes ---

// Replaces the bins of the student, or of the difference, by the gradient with respect to them; adds up losses.
template <class A, Compare kCompare, bool kSpectra>
void compare_bins(const FourierArguments& layer, const A* weights, int64_t bins, const FourierScratch<A>& scratch,
                  DoubleSum<A>& sum) {
  const auto compare = [&](int64_t i) SKD_INLINED {
    if constexpr (kCompare == Compare::complex) {
      return compare_complex(scratch.s[i], kSpectra ? scratch.t[i] : scratch.s[i], kSpectra);
    } else {
      return compare_magnitudes(scratch.s[i], scratch.t[i], kCompare == Compare::log_magnitude);
    }
  };
  const A focal = A(layer.focal);
  Vector<A> largest{};
  if (focal != 0) {
    for (int64_t i = 0; i < bins; ++i) {
      const Vector<A> squared = compare(i).squared;
      largest = squared > largest ? squared : largest;
    }
  }
  for (int64_t first = 0; first < bins; first += kTermsInFloat) {
    Vector<A> part{};
    for (int64_t i = first; i < min64(bins, first + kTermsInFloat); ++i) {
      const Compared<Vector<A>> bin = compare(i);
      Vector<A> weight = Vector<A>{} + weights[i];
      if (focal != 0) weight *= focal_weight(bin.squared, largest, focal);
      part += weight * bin.squared;
      scratch.s[i] = {bin.direction.re * weight, bin.direction.im * weight};
      if (kSpectra) {
        scratch.magnitudes[0][i] += bin.student;
        scratch.magnitudes[1][i] += bin.teacher;
      }
    }
    sum.add(part);
  }
}

template <class A, Compare kCompare>
void compare_bins(const FourierArguments& layer, const A* weights, int64_t bins, const FourierScratch<A>& scratch,
                  DoubleSum<A>& sum) {
  const auto run = layer.spectra != nullptr ? compare_bins<A, kCompare, true> : compare_bins<A, kCompare, false>;
  run(layer, weights, bins, scratch, sum);
}

template <class A>
void align_lanes(const FourierArguments& layer, const Prepared<A>& prepared, const FourierScratch<A>& scratch,
                 TileLanes<A> student, TileLanes<A> teacher, DoubleSum<A>& sum) {
  const int64_t positions = layer.student.shape[2] * layer.student.shape[3], bins = prepared.transform.size();
  const A norm = A(1 / std::sqrt(double(positions)));
  const bool complex = layer.compare == Compare::complex;
  if (complex) {
    for (int64_t p = 0; p < positions; ++p) student.store(p, student.load(p) - teacher.load(p));
  }
  prepared.transform.forward(student, norm, scratch.s, scratch.work);
  if (!complex || layer.spectra != nullptr) prepared.transform.forward(teacher, norm, scratch.t, scratch.work);
  const A* const weights = prepared.weights.data();
  switch (layer.compare) {
    case Compare::complex: compare_bins<A, Compare::complex>(layer, weights, bins, scratch, sum); break;
    case Compare::magnitude: compare_bins<A, Compare::magnitude>(layer, weights, bins, scratch, sum); break;
    case Compare::log_magnitude: compare_bins<A, Compare::log_magnitude>(layer, weights, bins, scratch, sum); break;
  }
  if (layer.gradient.data == nullptr) return;
  prepared.transform.adjoint(scratch.s, norm * A(layer.gradient_scale), student, scratch.work);
}

// --- A block of channels of an image ---

template <class A, class T>
void store_gradient(const Map& gradient, const Block& block, const A* tile, int64_t lanes, A* planes) {
  const int64_t positions = block.rows * gradient.shape[3];
  if (order_of(gradient) == Order::planes) {
    tile_to_planes<A>(tile, positions, lanes, planes);
    for (int64_t c = 0; c < block.channels; ++c) {
      store_plane<A>(planes + c * positions, positions, at<T>(gradient, block.image, block.channel + c, 0));
    }
  } else if (gradient.stride[1] == 1 && block.channels % kWidth<A> == 0) {
    for (int64_t h = 0; h < block.rows; ++h) {
      T* p = at<T>(gradient, block.image, block.channel, h);
      for (int64_t w = 0; w < gradient.shape[3]; ++w, tile += lanes, p += gradient.stride[3]) {
        for (int64_t c = 0; c < block.channels; c += kWidth<A>) {
          Access<A, T>::store(p + c, Access<A, A>::load(tile + c));
        }
      }
    }
  } else {
    store_tile<A, T>(gradient, block, tile, lanes);
  }
}

// Memory of the next block is fetched while this one is computed, a share with every vector of planes.
struct Ahead {
  const Block* block;  // null after the last one
  int64_t share, shares;

  void fetch(const Map& map, int64_t width, bool to_write) const {
    if (block == nullptr || map.data == nullptr) return;
    const int64_t size = map.dtype == DType::float64 ? 8 : map.dtype == DType::float32 ? 4 : 2;
    const int64_t first = channel_window(block->channel, map.shape[1], width).begin;
    const int64_t last = channel_window(block->channel + block->channels - 1, map.shape[1], width).end;
    const int64_t columns = map.shape[3], positions = block->rows * columns;
    const auto lines = [&](const char* begin, int64_t bytes) {
      for (int64_t at = 0; at < bytes; at += 64)
        to_write ? __builtin_prefetch(begin + at, 1) : __builtin_prefetch(begin + at);
    };
    const char* const base = map.data + (block->image * map.stride[0] + first * map.stride[1]) * size;
    switch (order_of(map)) {
      case Order::channels:
        for (int64_t p = share * positions / shares; p < (share + 1) * positions / shares; ++p) {
          lines(base + (p / columns * map.stride[2] + p % columns * map.stride[3]) * size, (last - first) * size);
        }
        break;
      case Order::planes:
        for (int64_t c = share * (last - first) / shares; c < (share + 1) * (last - first) / shares; ++c) {
          lines(base + c * map.stride[1] * size, positions * size);
        }
        break;
      case Order::any: break;
    }
  }
};

template <class A>
double align_block(const FourierArguments& layer, const Prepared<A>& prepared, const FourierCut<A>& cut,
                   const FourierScratch<A>& scratch, const Block& block, const Block* next, double* spectra) {
  const int64_t lanes = padded<A>(block.channels), bins = prepared.transform.size();
  load_tile<A>(layer.student, cut.width, block, scratch.student, lanes);
  load_tile<A>(layer.teacher, cut.width, block, scratch.teacher, lanes);
  if (spectra != nullptr) {
    for (int64_t i = 0; i < bins; ++i) scratch.magnitudes[0][i] = scratch.magnitudes[1][i] = Vector<A>{};
  }
  DoubleSum<A> sum;
  for (int64_t c = 0; c < lanes; c += kWidth<A>) {
    const Ahead ahead{next, c / kWidth<A>, lanes / kWidth<A>};
    ahead.fetch(layer.student, cut.width, false);
    ahead.fetch(layer.teacher, cut.width, false);
    ahead.fetch(layer.gradient, cut.width, true);
    align_lanes<A>(layer, prepared, scratch, {scratch.student + c, lanes}, {scratch.teacher + c, lanes}, sum);
  }
  for (int map = 0; spectra != nullptr && map < 2; ++map) {
    for (int64_t i = 0; i < bins; ++i) {
      const Vector<A> magnitude = scratch.magnitudes[map][i];
      double total = 0;
      for (int lane = 0; lane < kWidth<A>; ++lane) total += double(magnitude[lane]);
      spectra[map * bins + i] += total;
    }
  }
  if (layer.gradient.data != nullptr) {
    const bool pooled_student = layer.student.shape[1] > cut.width;
    SKD_FOR_DTYPE(layer.gradient.dtype, T, {
      if (pooled_student) {
        store_unpooled<A, T>(layer.gradient, block, scratch.student, lanes);
      } else {
        store_gradient<A, T>(layer.gradient, block, scratch.student, lanes, scratch.planes);
      }
    })
  }
  return sum.total();
}

template <class A>
double run_as(const FourierLayer& layer, int64_t item, void* memory, double* spectra) {
  const auto& prepared = *static_cast<const Prepared<A>*>(layer.prepared.get());
  const FourierCut<A> cut(layer);
  const FourierScratch<A> scratch(layer, cut, prepared.transform, memory);
  const auto block_of = [&](int64_t unit) {
    const int64_t channel = unit % cut.blocks * cut.channels;
    return Block{unit / cut.blocks, channel, min64(cut.channels, cut.width - channel), 0, layer.student.shape[2]};
  };
  double sum = 0;
  const int64_t last = (item + 1) * cut.units / cut.items;
  for (int64_t unit = item * cut.units / cut.items; unit < last; ++unit) {
    const Block block = block_of(unit), next = block_of(unit + 1);
    sum += align_block<A>(layer, prepared, cut, scratch, block, unit + 1 < last ? &next : nullptr, spectra);
  }
  return sum;
}

// --- The interface ---

inline bool in_double(const FourierArguments& layer) {
  return layer.student.dtype == DType::float64 || layer.teacher.dtype == DType::float64;
}

std::shared_ptr<const void> prepare(const FourierArguments& layer) {
  if (in_double(layer)) return std::make_shared<Prepared<double>>(layer);
  return std::make_shared<Prepared<float>>(layer);
}

int64_t items(const FourierLayer& layer) {
  return in_double(layer) ? FourierCut<double>(layer).items : FourierCut<float>(layer).items;
}

template <class A>
size_t scratch_bytes_as(const FourierLayer& layer) {
  const auto& prepared = *static_cast<const Prepared<A>*>(layer.prepared.get());
  return FourierScratch<A>(layer, FourierCut<A>(layer), prepared.transform, nullptr).bytes;
}

size_t scratch_bytes(const FourierLayer& layer) {
  return in_double(layer) ? scratch_bytes_as<double>(layer) : scratch_bytes_as<float>(layer);
}

double run(const FourierLayer& layer, int64_t item, void* scratch, double* spectra) {
  return in_double(layer) ? run_as<double>(layer, item, scratch, spectra)
                          : run_as<float>(layer, item, scratch, spectra);
}

}  // namespace

extern const FourierKernel fourier_kernel = {prepare, items, scratch_bytes, run};

}  // namespace SKD_ISA
}  // namespace skd
