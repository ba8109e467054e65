// The arithmetic of spectral_align with a lane for each channel: for maps whose channels are adjacent, and, through
// tiles, for any other. Row sums stay in their lanes; memory is swept in the order it lies in.
#pragma once

#include "cpu/tile.h"

namespace skd {
namespace SKD_ISA {
namespace {

// Rows with adjacent channels, of a map or of a tile; kRatio adjacent channels are averaged as they are read.
template <class A, class T, int kRatio = 1>
struct Rows {
  T* data;
  int64_t row_stride, column_stride;
  inline Rows row(int64_t h) const { return {data + h * row_stride, 0, column_stride}; }
  inline Rows column(int64_t w) const { return {data + w * column_stride, 0, 0}; }
  inline Vector<A> load(int64_t channel) const {
    const Vector<A> sum = AdjacentSums<A, T, kRatio>::load(data + channel * kRatio);
    return kRatio == 1 ? sum : sum * (A(1) / kRatio);
  }
  inline void store(int64_t channel, Vector<A> v) const { Access<A, T>::store(data + channel, v); }
};

// Aligned rows of a gradient that are written past the caches.
template <class A>
struct StreamedRows {
  A* data;
  int64_t row_stride, column_stride;
  inline StreamedRows row(int64_t h) const { return {data + h * row_stride, 0, column_stride}; }
  inline StreamedRows column(int64_t w) const { return {data + w * column_stride, 0, 0}; }
  inline void store(int64_t channel, Vector<A> v) const { stream<A>(data + channel, v); }
};

inline bool is_aligned(const Map& map, int64_t size) {
  const uintptr_t strides = uintptr_t((map.stride[0] | map.stride[2] | map.stride[3]) * size);
  return (uintptr_t(map.data) | strides) % kVectorBytes == 0;
}

template <class A, class T, int kRatio = 1>
inline Rows<A, T, kRatio> rows_of(const Map& map, const Block& block) {
  return {at<T>(map, block.image, block.channel * kRatio, block.row), map.stride[2], map.stride[3]};
}

template <class A>
inline Rows<A, A> rows_of_tile(A* tile, int64_t columns, int64_t lanes) {
  return {tile, columns * lanes, lanes};
}

// Buffers for one row: the sums of its even and of its odd columns, in two steps, and its difference.
template <class A>
inline int64_t row_scratch(int64_t columns, int64_t lanes) {
  return (columns + 4) * lanes;
}

// One column: difference = student - teacher, added to `sums`; its squares go to `squares`.
template <class A, bool kGradient, class Student, class Teacher>
inline void subtract_column(Student student, Teacher teacher, A* difference, A* sums, int64_t lanes,
                            DoubleSum<A>& squares) {
  constexpr int n = kWidth<A>;
  for (int64_t first = 0; first < lanes; first += 2 * n * kTermsInFloat) {
    const int64_t last = min64(lanes, first + 2 * n * kTermsInFloat);
    Vector<A> part[2] = {};
    int64_t c = first;
    for (; c + 2 * n <= last; c += 2 * n) {
      const Vector<A> d0 = student.load(c) - teacher.load(c);
      const Vector<A> d1 = student.load(c + n) - teacher.load(c + n);
      if (kGradient) {
        Access<A, A>::store(difference + c, d0);
        Access<A, A>::store(difference + c + n, d1);
      }
      Access<A, A>::store(sums + c, Access<A, A>::load(sums + c) + d0);
      Access<A, A>::store(sums + c + n, Access<A, A>::load(sums + c + n) + d1);
      part[0] += d0 * d0;
      part[1] += d1 * d1;
    }
    for (; c < last; c += n) {
      const Vector<A> d = student.load(c) - teacher.load(c);
      if (kGradient) Access<A, A>::store(difference + c, d);
      Access<A, A>::store(sums + c, Access<A, A>::load(sums + c) + d);
      part[0] += d * d;
    }
    squares.add(part[0]);
    squares.add(part[1]);
  }
}

// to += from, from = 0
template <class A>
inline void move_sums(A* from, A* to, int64_t count) {
  for (int64_t c = 0; c < count; c += kWidth<A>) {
    Access<A, A>::store(to + c, Access<A, A>::load(to + c) + Access<A, A>::load(from + c));
    Access<A, A>::store(from + c, Vector<A>{});
  }
}

// sum d (d + row_weight S) over rows, where S are the row sums over columns of equal parity (even W) or over the whole
// row (odd W); with kGradient also gradient_scale * (d + row_weight S). `lanes` is a multiple of a vector.
template <class A, bool kGradient, class Student, class Teacher, class Gradient>
double align_rows(Student student, Teacher teacher, Gradient gradient, A* scratch, int64_t rows, int64_t columns,
                  int64_t lanes, A row_weight, A gradient_scale) {
  constexpr int n = kWidth<A>;
  constexpr int64_t kColumnsInPart = 2 * kTermsInFloat;
  const bool odd_width = columns % 2 != 0;
  A* const sums[2] = {scratch, scratch + lanes};
  A* const part[2] = {scratch + 2 * lanes, scratch + 3 * lanes};  // of kColumnsInPart columns at most
  A* const difference = scratch + 4 * lanes;
  DoubleSum<A> squares, row_squares;
  for (int64_t c = 0; c < 2 * lanes; c += n) Access<A, A>::store(part[0] + c, Vector<A>{});
  for (int64_t h = 0; h < rows; ++h) {
    for (int64_t c = 0; c < 2 * lanes; c += n) Access<A, A>::store(sums[0] + c, Vector<A>{});
    const auto s_row = student.row(h);
    const auto t_row = teacher.row(h);
    for (int64_t w = 0; w < columns; ++w) {
      subtract_column<A, kGradient>(s_row.column(w), t_row.column(w), difference + w * lanes, part[w % 2], lanes,
                                    squares);
      if ((w + 1) % kColumnsInPart == 0 || w + 1 == columns) move_sums(part[0], sums[0], 2 * lanes);
    }
    if (row_weight != 0) {
      for (int64_t c = 0; c < lanes; c += n) {
        RowSums<Vector<A>> sum{Access<A, A>::load(sums[0] + c), Access<A, A>::load(sums[1] + c)};
        row_squares.add(close_row(sum, odd_width));
        Access<A, A>::store(sums[0] + c, sum.even * (row_weight * gradient_scale));
        Access<A, A>::store(sums[1] + c, sum.odd * (row_weight * gradient_scale));
      }
    } else if (kGradient) {  // an infinite sum must not turn the plain match's gradient into NaN
      for (int64_t c = 0; c < 2 * lanes; c += n) Access<A, A>::store(sums[0] + c, Vector<A>{});
    }
    if (!kGradient) continue;
    const auto g_row = gradient.row(h);
    for (int64_t w = 0; w < columns; ++w) {
      const auto g = g_row.column(w);
      const A *d = difference + w * lanes, *sum = sums[w % 2];
      for (int64_t c = 0; c < lanes; c += n) {
        g.store(c, scaled_gradient(Access<A, A>::load(d + c), gradient_scale, Access<A, A>::load(sum + c)));
      }
    }
  }
  return squares.total() + row_squares.total() * double(row_weight);
}

template <class A, class Student, class Teacher, class Gradient>
double align_rows(const AlignLayer& layer, Student student, Teacher teacher, Gradient gradient, A* scratch,
                  int64_t rows, int64_t lanes) {
  const auto run = layer.gradient.data != nullptr ? align_rows<A, true, Student, Teacher, Gradient>
                                                  : align_rows<A, false, Student, Teacher, Gradient>;
  return run(student, teacher, gradient, scratch, rows, layer.student.shape[3], lanes, A(layer.row_weight),
             A(layer.gradient_scale));
}

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd
