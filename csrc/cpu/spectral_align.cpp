// The alignment loss and its gradient in one pass over both maps. Compiled once per instruction set (SKD_ISA).
//
// Bytes: both maps read once, the gradient written once. Arithmetic per number of the student: a subtraction, an
// addition and two multiply-adds for the sums, a multiply-add for the gradient.
#include "cpu/spectral_align.h"

#include "cpu/align_lanes.h"
#include "cpu/align_planes.h"
#include "cpu/align_short_rows.h"

namespace skd {
namespace SKD_ISA {
namespace {

// --- How a layer is cut up ---

// An item is a contiguous stretch of the student's memory: some channels of all rows where planes are contiguous, some
// rows of all channels elsewhere (or where the gradient is spread over channel windows).
enum class Path { planes, rows, pooled_student };

constexpr int64_t kRowBytes = 24 << 10;    // a row's difference stays in the first-level cache
constexpr int64_t kTileBytes = 192 << 10;  // a tile in the second
constexpr int64_t kItemBytes = 64 << 10;   // enough work to be worth handing to a thread
constexpr int64_t kPlanesBytes = 12544;    // 16 planes of 14x14 in float32, twice, fit a first-level cache of 32 KB

template <class A>
struct Cut {
  Path path;
  int64_t width;             // pooled channels
  int64_t channels;          // in a block, at most; a multiple of kLanes where there are tiles
  int64_t rows;              // in a block, at most
  int64_t channels_in_item;  // on the path of planes
  int64_t items_in_image;

  explicit Cut(const AlignLayer& layer) {
    const Map &s = layer.student, &g = layer.gradient;
    const int64_t height = s.shape[2], columns = s.shape[3];
    width = min64(s.shape[1], layer.teacher.shape[1]);
    if (s.shape[1] > width) {
      path = Path::pooled_student;
    } else if (order_of(s) == Order::planes && (g.data == nullptr || order_of(g) == Order::planes)) {
      path = Path::planes;
    } else {
      path = Path::rows;
    }
    if (path == Path::planes) {
      const int64_t size = int64_t(sizeof(A)), plane = height * columns * size;
      if (order_of(layer.teacher) == Order::planes) {
        channels = max64(1, kPlanesBytes / plane);
        rows = evenly(height, max64(1, 4 * kPlanesBytes / (columns * size)));
      } else {  // through a tile: more channels at a time are longer stretches of the teacher's memory
        channels = min64(4 * kLanes<A>, padded<A>(width));
        rows = evenly(height, max64(1, kPlanesBytes / (kLanes<A> * size) / columns));
      }
      channels_in_item = channels * divide_up(min64(width, max64(1, kItemBytes / plane)), channels);
      items_in_image = divide_up(width, channels_in_item);
      return;
    }
    // Rows go through in stretches of channels; a teacher in planes is transposed once for all rows of the item.
    const int64_t line = kLanes<A> * columns * int64_t(sizeof(A));
    const int64_t lines = divide_up(width, kLanes<A>);
    channels = kLanes<A> * (path == Path::rows ? evenly(lines, max64(1, kRowBytes / line)) : lines);
    const int64_t bytes = order_of(layer.teacher) == Order::channels ? kItemBytes : kTileBytes;
    rows = evenly(height, max64(1, bytes / (channels * columns * int64_t(sizeof(A)))));
    items_in_image = divide_up(height, rows);
  }

  // At most `most` at a time, in parts of about one size.
  static int64_t evenly(int64_t n, int64_t most) { return divide_up(n, divide_up(n, most)); }

  // Numbers of scratch memory.
  int64_t tile(const AlignLayer& layer) const { return rows * layer.student.shape[3] * channels; }
  int64_t scratch(const AlignLayer& layer) const {
    const int64_t columns = layer.student.shape[3];
    if (path == Path::planes) return padded<A>(rows * columns) + 4 * (tile(layer) + kLanes<A>);
    return 2 * tile(layer) + row_scratch<A>(columns, channels);
  }
};

// --- The three paths ---

// Float32 planes with rows of a usual length, straight from map to map; `pooled` holds the teacher's planes, or is null
// where they are read from the teacher. False if there is no such loop.
inline bool align_short_planes(const AlignLayer& layer, const Block& block, int64_t width, const float* pooled,
                               float* scratch, double& sum) {
  const Map &student = layer.student, &teacher = layer.teacher, &gradient = layer.gradient;
  const int64_t columns = student.shape[3], plane = student.shape[2] * columns, positions = block.rows * columns;
  const int64_t count = pooled ? 1 : teacher.shape[1] / width;
  const bool readable = pooled || (teacher.dtype == DType::float32 && count * width == teacher.shape[1]);
  const bool with_gradient = gradient.data != nullptr;
  const ShortRows run = short_rows(columns, count, with_gradient);
  if (run == nullptr || !readable || student.dtype != DType::float32 || layer.row_weight == 0) return false;
  float* out = with_gradient ? at<float>(gradient, block.image, block.channel, block.row) : nullptr;
  // Rows do not begin where vectors do, so a gradient to be streamed is collected first.
  const bool contiguous = block.channels == 1 || (positions == plane && gradient.stride[1] == plane);
  const bool streamed = with_gradient && layer.stream_gradient && contiguous;
  const int64_t out_stride = streamed ? positions : gradient.stride[1];
  if (streamed) out = scratch;
  // Where planes follow each other in all three maps they are one long plane.
  const bool one = count == 1 && positions == plane && student.stride[1] == plane &&
                   (pooled || teacher.stride[1] == plane) && (!with_gradient || out_stride == plane);
  const int64_t planes = one ? 1 : block.channels, rows = one ? block.channels * block.rows : block.rows;
  ShortRowSums sums;
  for (int64_t c = 0; c < planes; ++c) {
    const int64_t channel = block.channel + c;
    run(at<float>(student, block.image, channel, block.row),
        pooled ? pooled + c * positions : at<float>(teacher, block.image, channel * count, block.row),
        teacher.stride[1], with_gradient ? out + c * out_stride : nullptr, rows, float(layer.row_weight),
        float(layer.gradient_scale), sums);
  }
  if (streamed) {
    stream_copy(scratch, at<float>(gradient, block.image, block.channel, block.row), block.channels * positions);
  }
  sum += sums.squares.total() + sums.row_squares.total(columns % 2 ? 1 : 2) * layer.row_weight;
  return true;
}

// A group of planes; lanes are positions. A teacher in planes is pooled as it is read, any other through a tile.
template <class A>
double align_planes(const AlignLayer& layer, const Block& block, const Cut<A>& cut, A* scratch) {
  const Map &student = layer.student, &teacher = layer.teacher, &gradient = layer.gradient;
  const int64_t columns = student.shape[3], positions = block.rows * columns, size = cut.tile(layer) + kLanes<A>;
  A *difference = scratch, *scaled = scratch + size, *tile = scratch + 2 * size, *planes = scratch + 3 * size;
  A* averaged = scratch + 4 * size;
  const bool teacher_in_planes = order_of(teacher) == Order::planes;
  double sum = 0;
  if (!teacher_in_planes) {
    const int64_t lanes = padded<A>(block.channels);
    load_tile<A>(teacher, cut.width, block, tile, TileShape<A>::side_by_side(lanes));
    tile_to_planes<A>(tile, positions, lanes, planes);
  }
  if constexpr (sizeof(A) == sizeof(float)) {
    if (align_short_planes(layer, block, cut.width, teacher_in_planes ? nullptr : planes, scaled, sum)) return sum;
  }
  for (int64_t c = 0; c < block.channels; ++c) {
    const A* pooled = planes + c * positions;
    if (teacher_in_planes) {
      SKD_FOR_DTYPE(teacher.dtype, T,
                    pooled = pool_plane<A, T>(teacher, cut.width, block, block.channel + c, averaged);)
    }
    SKD_FOR_DTYPE(student.dtype, T,
                  sum += subtract_plane<A>(at<T>(student, block.image, block.channel + c, block.row), pooled, positions,
                                           difference + c * positions);)
  }
  const A row_weight = A(layer.row_weight), gradient_scale = A(layer.gradient_scale);
  if (row_weight == 0) {
    scale_planes<A>(difference, scaled, block.channels * positions, gradient_scale);
  } else {
    const auto rows = columns % 2 ? plane_rows<A, true> : plane_rows<A, false>;
    sum += rows(difference, scaled, block.channels * block.rows, columns, row_weight, gradient_scale);
  }
  for (int64_t c = 0; gradient.data != nullptr && c < block.channels; ++c) {
    SKD_FOR_DTYPE(
        gradient.dtype, T,
        store_plane<A>(scaled + c * positions, positions, at<T>(gradient, block.image, block.channel + c, block.row));)
  }
  return sum;
}

// Via tiles: any order, any dtype. The gradient is left in `student_tile`.
template <class A>
double align_tile(const AlignLayer& layer, const Block& block, const Cut<A>& cut, A* student_tile) {
  const int64_t columns = layer.student.shape[3], lanes = padded<A>(block.channels);
  A *teacher_tile = student_tile + cut.tile(layer), *scratch = teacher_tile + cut.tile(layer);
  load_tile<A>(layer.student, cut.width, block, student_tile, TileShape<A>::side_by_side(lanes));
  load_tile<A>(layer.teacher, cut.width, block, teacher_tile, TileShape<A>::side_by_side(lanes));
  const Rows<A, A> student = rows_of_tile(student_tile, columns, lanes);
  return align_rows<A>(layer, student, rows_of_tile(teacher_tile, columns, lanes), student, scratch, block.rows, lanes);
}

// Student and gradient are used where they lie; the teacher too if it is float32 and its ratio is a small power of two.
template <class T>
double align_in_place(const AlignLayer& layer, const Block& block, const Cut<float>& cut, float* tile) {
  const Map& teacher = layer.teacher;
  const int64_t columns = teacher.shape[3];
  const Rows<float, T> student = rows_of<float, T>(layer.student, block);
  const Rows<float, T> gradient = layer.gradient.data ? rows_of<float, T>(layer.gradient, block) : student;
  const bool streamed =
      sizeof(T) == sizeof(float) && layer.stream_gradient && is_aligned(layer.gradient, int64_t(sizeof(float)));
  const auto run = [&](auto teacher_rows) {
    float* scratch = tile + cut.tile(layer);
    if (streamed) {
      const StreamedRows<float> past_caches{reinterpret_cast<float*>(gradient.data), gradient.row_stride,
                                            gradient.column_stride};
      return align_rows<float>(layer, student, teacher_rows, past_caches, scratch, block.rows, block.channels);
    }
    return align_rows<float>(layer, student, teacher_rows, gradient, scratch, block.rows, block.channels);
  };
  if (teacher.dtype == DType::float32 && order_of(teacher) == Order::channels) {
    if (teacher.shape[1] == cut.width) return run(rows_of<float, float, 1>(teacher, block));
    if (teacher.shape[1] == 2 * cut.width) return run(rows_of<float, float, 2>(teacher, block));
    if (teacher.shape[1] == 4 * cut.width) return run(rows_of<float, float, 4>(teacher, block));
  }
  load_tile<float>(teacher, cut.width, block, tile, TileShape<float>::side_by_side(block.channels));
  return run(rows_of_tile(tile, columns, block.channels));
}

template <class A>
double align_rows_of_maps(const AlignLayer& layer, const Block& block, const Cut<A>& cut, A* scratch) {
  const bool adjacent = order_of(layer.student) == Order::channels &&
                        (layer.gradient.data == nullptr ||
                         (order_of(layer.gradient) == Order::channels && layer.gradient.dtype == layer.student.dtype));
  if constexpr (sizeof(A) == sizeof(float)) {
    if (adjacent && block.channels % kWidth<A> == 0) {
      switch (layer.student.dtype) {
        case DType::bfloat16: return align_in_place<bfloat16>(layer, block, cut, scratch);
        case DType::float16: return align_in_place<float16>(layer, block, cut, scratch);
        default: return align_in_place<float>(layer, block, cut, scratch);
      }
    }
  }
  const double sum = align_tile<A>(layer, block, cut, scratch);
  if (layer.gradient.data != nullptr) {
    SKD_FOR_DTYPE(
        layer.gradient.dtype, T,
        store_tile<A, T>(layer.gradient, block, scratch, TileShape<A>::side_by_side(padded<A>(block.channels)));)
  }
  return sum;
}

template <class A>
double align_pooled_student(const AlignLayer& layer, const Block& block, const Cut<A>& cut, A* scratch) {
  const double sum = align_tile<A>(layer, block, cut, scratch);
  if (layer.gradient.data != nullptr) {
    SKD_FOR_DTYPE(layer.gradient.dtype, T,
                  store_unpooled<A, T>(layer.gradient, block, scratch, TileShape<A>::side_by_side(cut.channels));)
  }
  return sum;
}

template <class A>
double run_as(const AlignLayer& layer, int64_t item, A* scratch) {
  const Cut<A> cut(layer);
  const int64_t height = layer.student.shape[2], part = item % cut.items_in_image;
  const bool planes = cut.path == Path::planes;
  const int64_t first_channel = planes ? part * cut.channels_in_item : 0;
  const int64_t last_channel = planes ? min64(cut.width, first_channel + cut.channels_in_item) : cut.width;
  const int64_t first_row = planes ? 0 : part * cut.rows;
  const int64_t last_row = planes ? height : min64(height, first_row + cut.rows);

  double sum = 0;
  Block block{item / cut.items_in_image, 0, 0, 0, 0};
  for (block.channel = first_channel; block.channel < last_channel; block.channel += cut.channels) {
    block.channels = min64(cut.channels, last_channel - block.channel);
    for (block.row = first_row; block.row < last_row; block.row += cut.rows) {
      block.rows = min64(cut.rows, last_row - block.row);
      switch (cut.path) {
        case Path::planes: sum += align_planes<A>(layer, block, cut, scratch); break;
        case Path::rows: sum += align_rows_of_maps<A>(layer, block, cut, scratch); break;
        case Path::pooled_student: sum += align_pooled_student<A>(layer, block, cut, scratch); break;
      }
    }
  }
  if (layer.stream_gradient) finish_streams();
  return sum;
}

// --- The interface ---

inline bool in_double(const AlignLayer& layer) {
  return layer.student.dtype == DType::float64 || layer.teacher.dtype == DType::float64;
}

int64_t items(const AlignLayer& layer) {
  const int64_t in_image = in_double(layer) ? Cut<double>(layer).items_in_image : Cut<float>(layer).items_in_image;
  return layer.student.shape[0] * in_image;
}

size_t scratch_bytes(const AlignLayer& layer) {
  return in_double(layer) ? size_t(Cut<double>(layer).scratch(layer)) * sizeof(double)
                          : size_t(Cut<float>(layer).scratch(layer)) * sizeof(float);
}

double run(const AlignLayer& layer, int64_t item, void* scratch) {
  return in_double(layer) ? run_as<double>(layer, item, static_cast<double*>(scratch))
                          : run_as<float>(layer, item, static_cast<float*>(scratch));
}

}  // namespace

extern const AlignKernel align_kernel = {items, scratch_bytes, run};

}  // namespace SKD_ISA
}  // namespace skd
