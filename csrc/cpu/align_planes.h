// The arithmetic of spectral_align with a lane for each position: for students in planes (NCHW), where a tile's
// transposes would cost more than the row sums across lanes do here.
//
// A group of planes goes through three loops, subtract, rows, store, rather than each plane through all three: a row
// begins anywhere in a vector, and reading it right after it was written would wait for the writes to reach the cache.
#pragma once

#include "cpu/tile.h"

namespace skd {
namespace SKD_ISA {
namespace {

// The first `count` lanes of v, the others zero.
template <class A>
inline Vector<A> first_lanes(Vector<A> v, int64_t count) {
  typedef typename VectorOf<A>::index Index;
  Index lane;
  for (int i = 0; i < kWidth<A>; ++i) lane[i] = i;
  const Index limit = Index{} + decltype(lane[0] + 0)(count);
  return bit_cast<Vector<A>>(bit_cast<Index>(v) & Index(lane < limit));
}

// The sum over lanes of equal parity (kStop = 2) or over all lanes (kStop = 1), in each of them.
template <class A, int kStop, int kStep = kWidth<A> / 2>
inline Vector<A> sum_over_lanes(Vector<A> v) {
  if constexpr (kStep < kStop) {
    return v;
  } else {
    return sum_over_lanes<A, kStop, kStep / 2>(v + exchanged<A, kStep>(v, AllLanes<A>()));
  }
}

// out = the average of `count` planes
template <class A, class T, int kCount>
inline void average_planes(const T* plane, int64_t stride, int64_t count, int64_t positions, A* out) {
  const A scale = A(1) / A(count);
  const bool whole = for_each_vector<kWidth<A>>(positions, [&](int64_t p) {
    Access<A, A>::store(out + p, add_planes<Vector<A>, T, kCount>(plane + p, stride, count) * scale);
  });
  if (whole) return;
  for (int64_t p = 0; p < positions; ++p) out[p] = add_planes_at<A, T>(plane + p, stride, count) * scale;
}

// A teacher's channel window as one plane: where it lies, if there is nothing to average or convert, else in `out`.
template <class A, class T>
inline const A* pool_plane(const Map& map, int64_t width, const Block& block, int64_t channel, A* out) {
  const ChannelWindow window = channel_window(channel, map.shape[1], width);
  const int64_t count = window.end - window.begin, positions = block.rows * map.shape[3];
  const T* plane = at<T>(map, block.image, window.begin, block.row);
  if (count == 1 && sizeof(T) == sizeof(A)) return reinterpret_cast<const A*>(plane);
  switch (count) {
    case 1: average_planes<A, T, 1>(plane, map.stride[1], count, positions, out); break;
    case 2: average_planes<A, T, 2>(plane, map.stride[1], count, positions, out); break;
    default: average_planes<A, T, 0>(plane, map.stride[1], count, positions, out);
  }
  return out;
}

// difference = student - teacher; returns the sum of its squares.
template <class A, class T>
inline double subtract_plane(const T* student, const A* teacher, int64_t positions, A* difference) {
  constexpr int n = kWidth<A>;
  DoubleSum<A> squares;
  int64_t p = 0;
  while (p + n <= positions) {
    Vector<A> part{};
    for (int i = 0; i < kTermsInFloat && p + n <= positions; ++i, p += n) {
      const Vector<A> d = Access<A, T>::load(student + p) - Access<A, A>::load(teacher + p);
      Access<A, A>::store(difference + p, d);
      part += d * d;
    }
    squares.add(part);
  }
  double sum = squares.total();
  for (; p < positions; ++p) {
    const A d = A(to_float(student[p])) - teacher[p];
    difference[p] = d;
    sum += double(d) * double(d);
  }
  return sum;
}

// gradient = gradient_scale * (difference + row_weight S) over contiguous rows; returns row_weight times the sum of
// their squared sums. Reads and writes whole vectors, so up to one vector past the end.
template <class A, bool kOddWidth>
double plane_rows(const A* difference, A* gradient, int64_t rows, int64_t columns, A row_weight, A gradient_scale) {
  constexpr int n = kWidth<A>, parities = kOddWidth ? 1 : 2;
  const int64_t whole = columns / n * n;
  const A sum_scale = row_weight * gradient_scale;
  DoubleSum<A> squares;
  for (int64_t h = 0; h < rows; ++h, difference += columns, gradient += columns) {
    Vector<A> sum{};
    for (int64_t first = 0; first < whole; first += n * kTermsInFloat) {
      Vector<A> part{};
      for (int64_t w = first; w < min64(whole, first + n * kTermsInFloat); w += n)
        part += Access<A, A>::load(difference + w);
      sum += part;
    }
    if (whole < columns) sum += first_lanes<A>(Access<A, A>::load(difference + whole), columns - whole);
    sum = sum_over_lanes<A, parities>(sum);
    squares.add(sum * sum);
    sum *= sum_scale;
    for (int64_t w = 0; w < columns; w += n) {  // runs over into the next row, which is written later
      Access<A, A>::store(gradient + w, scaled_gradient(Access<A, A>::load(difference + w), gradient_scale, sum));
    }
  }
  return squares.total(parities) * double(row_weight);
}

// The plain match has no row terms.
template <class A>
void scale_planes(const A* difference, A* gradient, int64_t count, A gradient_scale) {
  for (int64_t p = 0; p < count; p += kWidth<A>) {
    Access<A, A>::store(gradient + p, Access<A, A>::load(difference + p) * gradient_scale);
  }
}

template <class A, class T>
inline void store_plane(const A* gradient, int64_t positions, T* out) {
  const bool whole = for_each_vector<kWidth<A>>(
      positions, [&](int64_t p) { Access<A, T>::store(out + p, Access<A, A>::load(gradient + p)); });
  for (int64_t p = 0; !whole && p < positions; ++p) from_float(gradient[p], out[p]);
}

// A copy past the caches, but for the ends that fill no vector of the destination.
template <class A>
inline void stream_copy(const A* from, A* to, int64_t count) {
  int64_t p = 0;
  for (; p < count && uintptr_t(to + p) % kVectorBytes != 0; ++p) to[p] = from[p];
  for (; p + kWidth<A> <= count; p += kWidth<A>) stream<A>(to + p, Access<A, A>::load(from + p));
  for (; p < count; ++p) to[p] = from[p];
}

// [positions][lanes] -> [lanes][positions]
template <class A>
inline void tile_to_planes(const A* tile, int64_t positions, int64_t lanes, A* planes) {
  constexpr int n = kPart<A>;
  typedef VectorAccess<Part<A>, A> Numbers;
  for (int64_t first = 0; first < lanes; first += n) {
    const bool whole = for_each_vector<n>(positions, [&](int64_t p) {
      Part<A> rows[n];
      for (int i = 0; i < n; ++i) rows[i] = Numbers::load(tile + (p + i) * lanes + first);
      transpose(rows);
      for (int i = 0; i < n; ++i) Numbers::store(planes + (first + i) * positions + p, rows[i]);
    });
    for (int64_t p = 0; !whole && p < positions; ++p) {
      for (int i = 0; i < n; ++i) planes[(first + i) * positions + p] = tile[p * lanes + first + i];
    }
  }
}

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd
