// The alignment loss and its gradient in one pass over both maps. Compiled once per instruction set (SKD_ISA).
//
// Bytes: both maps read once, the gradient written once. Arithmetic per number of the student: a subtraction, two
// multiply-adds and an addition for the sums, a multiply-add and a product for the gradient.
#include "cpu/tile.h"

namespace skd {
namespace SKD_ISA {
namespace {

// --- The arithmetic -------------------------------------------------------------------------------------------------

// Rows of a tile. `Row` is what one row is read from or written to: vector j of the lanes at column w.
template <class A>
struct TileRows {
  A* tile;
  int64_t columns;
  struct Row {
    A* p;
    inline Vector<A> load(int64_t w, int j) const { return Access<A, A>::load(p + w * kLanes<A> + j * kWidth<A>); }
    inline void store(int64_t w, int j, Vector<A> v) const {
      Access<A, A>::store(p + w * kLanes<A> + j * kWidth<A>, v);
    }
  };
  inline Row row(int64_t h) const { return {tile + h * columns * kLanes<A>}; }
};

// Rows of a map with adjacent channels, used where they lie.
template <class A, class T, int kRatio = 1>
struct MapRows {
  T* data;
  int64_t row_stride, column_stride;
  MapRows(const Map& map, const Block& block)
      : data(at<T>(map, block.image, block.channel * kRatio, block.row)),
        row_stride(map.stride[2]),
        column_stride(map.stride[3]) {}
  struct Row {
    T* p;
    int64_t stride;
    inline Vector<A> load(int64_t w, int j) const {
      const Vector<A> sum = Pooled<A, T, kRatio>::load(p + w * stride + j * kWidth<A> * kRatio);
      return kRatio == 1 ? sum : sum * (A(1) / kRatio);
    }
    inline void store(int64_t w, int j, Vector<A> v) const { Access<A, T>::store(p + w * stride + j * kWidth<A>, v); }
  };
  inline Row row(int64_t h) const { return {data + h * row_stride, column_stride}; }
};

constexpr int64_t kFlushEvery = 128;  // squares added in the arithmetic's own precision before they go to double

// sum d (d + row_weight S) over a block, where S are the row sums over columns of equal parity (even W) or over the whole
// row (odd W). With kGradient also gradient_scale * (d + row_weight S).
template <class A, bool kGradient, class Student, class Teacher, class Gradient>
double align_rows(Student student, Teacher teacher, Gradient gradient, A* difference, int64_t rows, int64_t columns,
                  A row_weight, A gradient_scale) {
  constexpr int m = kVectors<A>;
  const int64_t parities = columns % 2 == 0 ? 2 : 1;
  const typename TileRows<A>::Row d_row{difference};
  double total = 0;
  Vector<A> squares[m] = {};
  int64_t unflushed = 0;
  const auto flush = [&] {
    for (int j = 0; j < m; ++j) {
      for (int i = 0; i < kWidth<A>; ++i) total += double(squares[j][i]);
      squares[j] = Vector<A>{};
    }
    unflushed = 0;
  };
  for (int64_t h = 0; h < rows; ++h) {
    const auto s_row = student.row(h);
    const auto t_row = teacher.row(h);
    Vector<A> sums[2][m] = {};
    for (int64_t w = 0; w + 1 < columns; w += 2) {
      for (int j = 0; j < m; ++j) {
        const Vector<A> even = s_row.load(w, j) - t_row.load(w, j);
        const Vector<A> odd = s_row.load(w + 1, j) - t_row.load(w + 1, j);
        if (kGradient) {
          d_row.store(w, j, even);
          d_row.store(w + 1, j, odd);
        }
        sums[0][j] += even;
        sums[1][j] += odd;
        squares[j] += even * even;
        squares[j] += odd * odd;
      }
      if ((unflushed += 2) >= kFlushEvery) flush();
    }
    if (columns % 2) {
      for (int j = 0; j < m; ++j) {
        const Vector<A> last = s_row.load(columns - 1, j) - t_row.load(columns - 1, j);
        if (kGradient) d_row.store(columns - 1, j, last);
        squares[j] += last * last;
        sums[0][j] += last + sums[1][j];
        sums[1][j] = sums[0][j];
      }
    }
    if (row_weight == 0) {
      for (int j = 0; j < m; ++j) sums[0][j] = sums[1][j] = Vector<A>{};
    }
    for (int64_t parity = 0; parity < parities; ++parity) {
      for (int j = 0; j < m; ++j) squares[j] += sums[parity][j] * sums[parity][j] * row_weight;
    }
    if (++unflushed >= kFlushEvery) flush();
    if (kGradient) {
      const auto g_row = gradient.row(h);
      for (int j = 0; j < m; ++j) {
        sums[0][j] *= row_weight * gradient_scale;
        sums[1][j] *= row_weight * gradient_scale;
      }
      for (int64_t w = 0; w + 1 < columns; w += 2) {
        for (int j = 0; j < m; ++j) {
          g_row.store(w, j, d_row.load(w, j) * gradient_scale + sums[0][j]);
          g_row.store(w + 1, j, d_row.load(w + 1, j) * gradient_scale + sums[1][j]);
        }
      }
      if (columns % 2) {
        for (int j = 0; j < m; ++j) {
          g_row.store(columns - 1, j, d_row.load(columns - 1, j) * gradient_scale + sums[0][j]);
        }
      }
    }
  }
  flush();
  return total;
}

template <class A, class Student, class Teacher, class Gradient>
double align_rows(bool with_gradient, Student student, Teacher teacher, Gradient gradient, A* difference, int64_t rows,
                  const AlignLayer& layer) {
  const int64_t columns = layer.student.shape[3];
  const A row_weight = A(layer.row_weight), scale = A(layer.gradient_scale);
  return with_gradient
             ? align_rows<A, true>(student, teacher, gradient, difference, rows, columns, row_weight, scale)
             : align_rows<A, false>(student, teacher, gradient, difference, rows, columns, row_weight, scale);
}

// --- How a layer is cut up ------------------------------------------------------------------------------------------

constexpr int64_t kTilePositions = 128;       // two tiles and the streams around them stay in the first-level cache
constexpr int64_t kPositionsPerItem = 1024;   // enough work to be worth handing to a thread

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A>
struct Cut {
  int64_t width;         // pooled channels
  int64_t groups;        // of kLanes pooled channels
  int64_t tile_rows, tiles_down;
  bool student_pooled;
  // An item is all groups of one tile's rows where channels are adjacent or the gradient is spread over windows that
  // cross groups, and some groups of all rows where planes are contiguous: either way a contiguous stretch of memory.
  bool items_are_rows;
  int64_t groups_per_item, items_per_image;

  explicit Cut(const AlignLayer& layer) {
    const Map &s = layer.student, &t = layer.teacher;
    const int64_t height = s.shape[2], columns = s.shape[3];
    width = min64(s.shape[1], t.shape[1]);
    groups = divide_up(width, kLanes<A>);
    tiles_down = divide_up(height, min64(height, max64(1, kTilePositions / columns)));
    tile_rows = divide_up(height, tiles_down);
    tiles_down = divide_up(height, tile_rows);
    student_pooled = s.shape[1] > width;
    items_are_rows = student_pooled || order_of(s) == Order::channels;
    groups_per_item = min64(groups, divide_up(kPositionsPerItem, height * columns));
    items_per_image = items_are_rows ? tiles_down : divide_up(groups, groups_per_item);
  }
  int64_t tile_size(const AlignLayer& layer) const { return tile_rows * layer.student.shape[3] * kLanes<A>; }
};

template <class A>
size_t scratch_bytes_as(const AlignLayer& layer) {
  const Cut<A> cut(layer);
  const int64_t tiles = cut.student_pooled ? cut.groups + 1 : 2;
  return size_t(tiles * cut.tile_size(layer)) * sizeof(A);
}

// --- One tile -------------------------------------------------------------------------------------------------------

#define SKD_FOR_DTYPE(dtype, T, ...)                     \
  switch (dtype) {                                       \
    case DType::float32: { using T = float; __VA_ARGS__ } break;     \
    case DType::float64: { using T = double; __VA_ARGS__ } break;    \
    case DType::bfloat16: { using T = bfloat16; __VA_ARGS__ } break; \
    case DType::float16: { using T = float16; __VA_ARGS__ } break;   \
  }

template <class A>
void load(const Map& map, int64_t width, const Block& block, A* tile) {
  SKD_FOR_DTYPE(map.dtype, T, load_tile<A, T>(map, width, block, tile);)
}

// Student and gradient are used where they lie; the teacher too if it is float32 and its ratio is a small power of two.
template <class T>
double align_in_place(const AlignLayer& layer, const Block& block, int64_t width, float* tile) {
  const Map& teacher = layer.teacher;
  const bool with_gradient = layer.gradient.data != nullptr;
  const MapRows<float, T> student(layer.student, block);
  const MapRows<float, T> gradient(with_gradient ? layer.gradient : layer.student, block);
  const auto run = [&](auto teacher_rows, float* difference) {
    return align_rows<float>(with_gradient, student, teacher_rows, gradient, difference, block.rows, layer);
  };
  if (teacher.dtype == DType::float32 && order_of(teacher) == Order::channels) {
    if (teacher.shape[1] == width) return run(MapRows<float, float, 1>(teacher, block), tile);
    if (teacher.shape[1] == 2 * width) return run(MapRows<float, float, 2>(teacher, block), tile);
    if (teacher.shape[1] == 4 * width) return run(MapRows<float, float, 4>(teacher, block), tile);
  }
  load<float>(teacher, width, block, tile);
  const int64_t columns = teacher.shape[3];
  return run(TileRows<float>{tile, columns}, tile + block.rows * columns * kLanes<float>);
}

// Via tiles: any order, any dtype. The gradient is left in the student's tile.
template <class A>
double align_tile(const AlignLayer& layer, const Block& block, int64_t width, A* student_tile, A* teacher_tile) {
  load<A>(layer.student, width, block, student_tile);
  load<A>(layer.teacher, width, block, teacher_tile);
  const int64_t columns = layer.student.shape[3];
  const TileRows<A> student{student_tile, columns}, teacher{teacher_tile, columns};
  return align_rows<A>(layer.gradient.data != nullptr, student, teacher, student, teacher_tile, block.rows, layer);
}

template <class A>
bool lies_in_place(const AlignLayer& layer, const Block& block) {
  if (sizeof(A) != sizeof(float) || block.lanes != kLanes<A> || order_of(layer.student) != Order::channels) return false;
  return layer.gradient.data == nullptr || order_of(layer.gradient) == Order::channels;
}

template <class A>
double run_block(const AlignLayer& layer, const Block& block, int64_t width, A* scratch, int64_t tile_size) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (lies_in_place<A>(layer, block)) {
      switch (layer.student.dtype) {
        case DType::bfloat16: return align_in_place<bfloat16>(layer, block, width, scratch);
        case DType::float16: return align_in_place<float16>(layer, block, width, scratch);
        default: return align_in_place<float>(layer, block, width, scratch);
      }
    }
  }
  const double sum = align_tile<A>(layer, block, width, scratch, scratch + tile_size);
  if (layer.gradient.data != nullptr) {
    SKD_FOR_DTYPE(layer.gradient.dtype, T, store_tile<A, T>(layer.gradient, block, scratch);)
  }
  return sum;
}

template <class A>
double run_as(const AlignLayer& layer, int64_t item, A* scratch) {
  const Cut<A> cut(layer);
  const int64_t tile_size = cut.tile_size(layer), height = layer.student.shape[2];
  const int64_t part = item % cut.items_per_image;
  const int64_t first_group = cut.items_are_rows ? 0 : part * cut.groups_per_item;
  const int64_t last_group = cut.items_are_rows ? cut.groups : min64(cut.groups, first_group + cut.groups_per_item);
  const int64_t first_tile = cut.items_are_rows ? part : 0;
  const int64_t last_tile = cut.items_are_rows ? part + 1 : cut.tiles_down;

  double sum = 0;
  Block block{item / cut.items_per_image, 0, 0, 0, 0};
  for (int64_t group = first_group; group < last_group; ++group) {
    block.channel = group * kLanes<A>;
    block.lanes = min64(kLanes<A>, cut.width - block.channel);
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      block.row = tile * cut.tile_rows;
      block.rows = min64(cut.tile_rows, height - block.row);
      if (cut.student_pooled) {
        A* teacher_tile = scratch + cut.groups * tile_size;
        sum += align_tile<A>(layer, block, cut.width, scratch + group * tile_size, teacher_tile);
      } else {
        sum += run_block<A>(layer, block, cut.width, scratch, tile_size);
      }
    }
  }
  if (cut.student_pooled && layer.gradient.data != nullptr) {
    SKD_FOR_DTYPE(layer.gradient.dtype, T,
                  store_unpooled<A, T>(layer.gradient, cut.width, block, scratch, tile_size);)
  }
  return sum;
}

// --- The interface --------------------------------------------------------------------------------------------------

inline bool in_double(const AlignLayer& layer) {
  return layer.student.dtype == DType::float64 || layer.teacher.dtype == DType::float64;
}

int64_t items(const AlignLayer& layer) {
  return layer.student.shape[0] * (in_double(layer) ? Cut<double>(layer).items_per_image : Cut<float>(layer).items_per_image);
}

size_t scratch_bytes(const AlignLayer& layer) {
  return in_double(layer) ? scratch_bytes_as<double>(layer) : scratch_bytes_as<float>(layer);
}

double run(const AlignLayer& layer, int64_t item, void* scratch) {
  return in_double(layer) ? run_as<double>(layer, item, static_cast<double*>(scratch))
                          : run_as<float>(layer, item, static_cast<float*>(scratch));
}

}  // namespace

extern const AlignKernel align_kernel = {items, scratch_bytes, run};

}  // namespace SKD_ISA
}  // namespace skd
