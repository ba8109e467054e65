// Losses on half spectra, their gradients and the pooled magnitudes in one pass over both maps. Compiled once per
// instruction set (SKD_ISA).
//
// Bytes: both maps read once, the gradient written once. Arithmetic per number of the student, at 14x14: two real
// transforms (of student and teacher) and one adjoint, about 13 operations each, and half a bin's comparison, about 30.
// A lane is a plane; a vector of planes goes through all steps in the first-level cache.
#include "cpu/fourier_align.h"

#include <algorithm>
#include <vector>

#include "cpu/compare_column.h"
#include "cpu/half_spectrum.h"
#include "cpu/scratch.h"
#include "cpu/tile.h"

namespace skd {
namespace SKD_ISA {
namespace {

// The most bytes of a map's tile, unless a single line of lanes has more: both maps' tiles and what they were read from
// are to stay in the second-level cache, beside the next block's memory.
constexpr int64_t kTileBytes = 25 << 10;
constexpr int64_t kUnitsInItem = 8;
constexpr int64_t kFewItems = 16;   // that are still enough for many threads
constexpr int64_t kMostItems = 64;  // of a layer with spectra: each keeps sums of its own

template <class A>
struct Prepared {
  HalfSpectrum<A> transform;
  Comparison<A> comparison;
  std::vector<A> weights;  // of the bins, [columns][height]: the bands, the inner columns' weight, a halved column's
  double loss_scale, gradient_scale, spectra_scale;  // that make up for transforms which are not normalised

  explicit Prepared(const FourierArguments& layer) : transform(layer.student.shape[2], layer.student.shape[3]) {
    const int64_t height = transform.height(), columns = transform.columns(), width = layer.student.shape[3];
    const double squared_norm = 1 / double(height * width), norm = std::sqrt(squared_norm);
    const bool logarithmic = layer.compare == Compare::log_magnitude;
    comparison = {A(norm), A(layer.focal)};
    loss_scale = logarithmic ? 1 : squared_norm;
    gradient_scale = layer.gradient_scale * (logarithmic ? norm : squared_norm);
    spectra_scale = logarithmic ? 1 : norm;
    const auto weight = [&](int64_t row, int64_t column) {
      const A band = layer.bands != nullptr ? reinterpret_cast<const A*>(layer.bands)[row * columns + column] : A(1);
      return is_inner(int(column), int(width)) ? band * A(layer.inner_weight) : band;
    };
    for (int64_t k = 0; k < columns; ++k) {
      for (int64_t h = 0; h < height; ++h) {
        const bool twice = transform.is_halved(k) && is_inner(int(h), int(height));
        weights.push_back(twice ? weight(h, k) + weight(height - h, k) : weight(h, k));
      }
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
    const int64_t fitting = min64(8, kTileBytes / line);
    const int64_t shared = lines / divide_up(kFewItems, max64(1, n[0]));  // among threads, where images are few
    // A gradient that is spread over windows of the student's channels needs all of these at once.
    const int64_t most = n[1] > width ? lines : max64(1, min64(fitting, shared));
    channels = kLanes<A> * divide_up(lines, divide_up(lines, most));
    blocks = divide_up(width, channels);
    units = n[0] * blocks;
    items = max64(min64(units, kFewItems), divide_up(units, kUnitsInItem));
    if (layer.spectra != nullptr) items = min64(items, kMostItems);
  }
};

// Scratch memory: tiles of both maps, then what a vector of planes needs.
template <class A>
struct FourierScratch {
  typedef Complex<Vector<A>> Bin;
  A *student, *teacher;
  Bin *s, *t, *work;
  Bin* columns[2];         // transformed, of student and teacher; all of them where all are needed at once, else one
  Part<A>* magnitudes[2];  // [columns][height], sums over the vectors of some blocks
  size_t bytes;

  FourierScratch(const FourierArguments& layer, const FourierCut<A>& cut, const HalfSpectrum<A>& transform,
                 void* memory) {
    const int64_t positions = layer.student.shape[2] * layer.student.shape[3], bins = transform.size();
    ScratchPieces pieces(memory);
    pieces.take(student, positions * cut.channels);
    pieces.take(teacher, positions * cut.channels);
    pieces.take(s, bins);
    pieces.take(t, bins);
    pieces.take(work, transform.work());
    for (int map = 0; map < 2; ++map) {
      pieces.take(columns[map], layer.focal != 0 ? bins : transform.height());
      pieces.take(magnitudes[map], layer.spectra != nullptr ? bins : 0);
    }
    bytes = pieces.bytes();
  }
};

// --- A vector of planes ---

// From the transforms of the rows in scratch.s and scratch.t to the gradient with respect to those in scratch.s.
template <class A, Compare kCompare, bool kMagnitudes>
void compare_columns(const FourierArguments& layer, const Prepared<A>& prepared, const FourierScratch<A>& scratch,
                     Prefetcher& prefetcher, DoubleSum<A>& sum) {
  const HalfSpectrum<A>& transform = prepared.transform;
  const int64_t height = transform.height(), columns = transform.columns();
  const bool focal = layer.focal != 0;
  const auto column = [&](int64_t k) {
    const int64_t place = k * height, buffer = focal ? place : 0;
    return BinColumn<A>{transform.bins_in_column(k),
                        scratch.columns[0] + buffer,
                        scratch.columns[1] + buffer,
                        prepared.weights.data() + place,
                        {scratch.magnitudes[0] + place, scratch.magnitudes[1] + place}};
  };
  const auto forward = [&](int64_t k) {
    prefetcher.step();
    transform.column_forward(scratch.s, k, column(k).student, scratch.work);
    if (kCompare != Compare::complex || kMagnitudes) {
      prefetcher.step();
      transform.column_forward(scratch.t, k, scratch.columns[1] + (focal ? k * height : 0), scratch.work);
    }
  };
  Vector<A> largest{};
  for (int64_t k = 0; focal && k < columns; ++k) {
    forward(k);
    find_largest<A, kCompare>(column(k), prepared.comparison.norm, largest);
  }
  for (int64_t k = 0; k < columns; ++k) {
    if (!focal) forward(k);
    prefetcher.step();
    compare_column<A, kCompare, kMagnitudes>(column(k), prepared.comparison, largest, sum);
    if (layer.gradient.data != nullptr) transform.column_adjoint(column(k).student, k, scratch.s, scratch.work);
  }
}

template <class A, Compare kCompare>
void compare_columns(const FourierArguments& layer, const Prepared<A>& prepared, const FourierScratch<A>& scratch,
                     Prefetcher& prefetcher, DoubleSum<A>& sum) {
  const bool magnitudes = layer.spectra != nullptr;
  (magnitudes ? compare_columns<A, kCompare, true> : compare_columns<A, kCompare, false>)(layer, prepared, scratch,
                                                                                          prefetcher, sum);
}

// `tile` may be where the student is, and may become the gradient.
template <class A>
void align_lanes(const FourierArguments& layer, const Prepared<A>& prepared, const FourierScratch<A>& scratch,
                 TileLanes<A> student, TileLanes<A> teacher, TileLanes<A> tile, TileLanes<A> gradient,
                 Prefetcher& prefetcher, DoubleSum<A>& sum) {
  const HalfSpectrum<A>& transform = prepared.transform;
  const bool complex = layer.compare == Compare::complex;
  if (complex) {
    const int64_t positions = layer.student.shape[2] * layer.student.shape[3];
    for (int64_t p = 0; p < positions; ++p) tile.store(p, student.load(p) - teacher.load(p));
  }
  transform.rows_forward(complex ? tile : student, scratch.s, scratch.work, prefetcher);
  if (!complex || layer.spectra != nullptr) transform.rows_forward(teacher, scratch.t, scratch.work, prefetcher);
  switch (layer.compare) {
    case Compare::complex: compare_columns<A, Compare::complex>(layer, prepared, scratch, prefetcher, sum); break;
    case Compare::magnitude: compare_columns<A, Compare::magnitude>(layer, prepared, scratch, prefetcher, sum); break;
    case Compare::log_magnitude:
      compare_columns<A, Compare::log_magnitude>(layer, prepared, scratch, prefetcher, sum);
      break;
  }
  if (layer.gradient.data == nullptr) return;
  transform.rows_adjoint(scratch.s, A(prepared.gradient_scale), gradient, scratch.work, prefetcher);
}

// --- A block of channels of an image ---

// What is left of a block that is no multiple of a vector goes number by number.
template <class A, class T>
void store_gradient(const Map& gradient, const Block& block, const A* tile, TileShape<A> shape) {
  constexpr int64_t n = kWidth<A>;
  const bool whole = block.channels % n == 0;
  if (order_of(gradient) == Order::planes) return store_planes<A, T>(gradient, block, tile, shape);
  if (order_of(gradient) != Order::channels || !whole) return store_tile<A, T>(gradient, block, tile, shape);
  for (int64_t h = 0; h < block.rows; ++h) {
    T* p = at<T>(gradient, block.image, block.channel, h);
    for (int64_t w = 0; w < gradient.shape[3]; ++w, tile += shape.position, p += gradient.stride[3]) {
      for (int64_t c = 0; c < block.channels; c += n) {
        Access<A, T>::store(p + c, Access<A, A>::load(tile + c / n * shape.vector));
      }
    }
  }
}

// Moves the magnitudes to the sums of their item, [2][height][columns].
template <class A>
void flush_magnitudes(const Prepared<A>& prepared, const FourierScratch<A>& scratch, double* spectra) {
  for (int map = 0; map < 2; ++map, spectra += prepared.transform.size()) {
    prepared.transform.move_sums(scratch.magnitudes[map], prepared.spectra_scale, spectra);
  }
}

template <class A>
double align_block(const FourierArguments& layer, const Prepared<A>& prepared, const FourierCut<A>& cut,
                   const FourierScratch<A>& scratch, const Block& block, const Block* next, int64_t& pending,
                   double* spectra) {
  const HalfSpectrum<A>& transform = prepared.transform;
  const int64_t positions = layer.student.shape[2] * layer.student.shape[3];
  const TileShape<A> shape = TileShape<A>::apart(padded<A>(block.channels), positions);
  const BlockLanes<A> student = load_lanes<A>(layer.student, cut.width, block, scratch.student, shape);
  const BlockLanes<A> teacher = load_lanes<A>(layer.teacher, cut.width, block, scratch.teacher, shape);
  const BlockLanes<A> gradient(layer.gradient, cut.width, block, scratch.student, shape);
  DoubleSum<A> sum;
  const int64_t vectors = divide_up(block.channels, kWidth<A>);
  Prefetcher prefetcher;  // of the next block
  if (next != nullptr) {
    prefetcher.add(layer.student, cut.width, *next);
    prefetcher.add(layer.teacher, cut.width, *next);
    if (layer.gradient.data != nullptr) prefetcher.add(layer.gradient, cut.width, *next);
    prefetcher.divide(vectors * 3 * (transform.height() + transform.columns()));  // rows and columns, thrice
  }
  for (int64_t v = 0; v < vectors; ++v) {
    const TileLanes<A> tile{scratch.student + v * shape.vector, shape.position};
    align_lanes<A>(layer, prepared, scratch, student[v], teacher[v], tile, gradient[v], prefetcher, sum);
    if (spectra != nullptr && ++pending == kTermsInFloat) {
      flush_magnitudes(prepared, scratch, spectra);
      pending = 0;
    }
  }
  if (layer.gradient.data != nullptr && !gradient.in_map()) {
    const bool pooled_student = layer.student.shape[1] > cut.width;
    const auto store = [&](auto number) {
      using T = decltype(number);
      (pooled_student ? store_unpooled<A, T> : store_gradient<A, T>)(layer.gradient, block, scratch.student, shape);
    };
    SKD_FOR_DTYPE(layer.gradient.dtype, T, store(T());)
  }
  return sum.total() * prepared.loss_scale;
}

template <class A>
double run_as(const FourierLayer& layer, int64_t item, bool goes_on, void* memory, double* spectra) {
  const auto& prepared = *static_cast<const Prepared<A>*>(layer.prepared.get());
  const FourierCut<A> cut(layer);
  const FourierScratch<A> scratch(layer, cut, prepared.transform, memory);
  const auto block_of = [&](int64_t unit) {
    const int64_t channel = unit % cut.blocks * cut.channels;
    return Block{unit / cut.blocks, channel, min64(cut.channels, cut.width - channel), 0, layer.student.shape[2]};
  };
  double sum = 0;
  const int64_t last = (item + 1) * cut.units / cut.items;
  int64_t pending = 0;  // vectors whose magnitudes are not in the spectra yet
  for (int map = 0; spectra != nullptr && map < 2; ++map) {
    std::fill_n(scratch.magnitudes[map], prepared.transform.size(), Part<A>{});
  }
  for (int64_t unit = item * cut.units / cut.items; unit < last; ++unit) {
    const Block block = block_of(unit), next = block_of(unit + 1);
    const bool has_next = goes_on || unit + 1 < last;
    sum += align_block<A>(layer, prepared, cut, scratch, block, has_next ? &next : nullptr, pending, spectra);
  }
  if (pending > 0) flush_magnitudes(prepared, scratch, spectra);
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

double run(const FourierLayer& layer, int64_t item, bool goes_on, void* scratch, double* spectra) {
  return in_double(layer) ? run_as<double>(layer, item, goes_on, scratch, spectra)
                          : run_as<float>(layer, item, goes_on, scratch, spectra);
}

}  // namespace

extern const FourierKernel fourier_kernel = {prepare, items, scratch_bytes, run};

}  // namespace SKD_ISA
}  // namespace skd
