// The positions of some images of a map, a vector of them at a time.
//
// Contiguous planes are cut into as many vectors as fit into each. What is left over at their ends shares a vector with
// what the next few images leave over, if that fills it, and has one with idle lanes otherwise; it comes after theirs.
// In other memory orders positions follow each other across images, and only the last vector may have idle lanes.
#pragma once

#include "common/align_layer.h"
#include "common/fft_codelets.h"
#include "cpu/prefetch.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace skd {
namespace SKD_ISA {
namespace {

template <class A>
class PositionVectors {
 public:
  PositionVectors(const Map& map, int64_t first_image, int64_t images)
      : map_(map),
        first_image_(first_image),
        images_(images),
        positions_(map.shape[2] * map.shape[3]),
        order_(order_of(map)),
        whole_(positions_ / kWidth<A>),
        rest_(positions_ % kWidth<A>),
        sharing_(rest_ > 0 && kWidth<A> % rest_ == 0 ? kWidth<A> / rest_ : 1) {}

  Order order() const { return order_; }

  int64_t count() const {
    if (order_ != Order::planes) return divide_up(images_ * positions_, kWidth<A>);
    return images_ * whole_ + divide_up(images_, sharing_) * (rest_ > 0);
  }

  // Whether vector v is contiguous in every plane, and where it begins in the first.
  bool is_contiguous(int64_t v) const {
    return order_ == Order::planes && place(v).vector < images_sharing(place(v)) * whole_;
  }
  template <class T>
  const T* contiguous(int64_t v) const {
    return at<T>(map_, first_image_ + image_of(place(v)), 0, 0) + place(v).vector % whole_ * kWidth<A>;
  }

  // The first channel of every lane of another vector. Returns how many are not idle; they come first.
  template <class T>
  int lanes(int64_t v, const T** lane) const {
    const bool planes = order_ == Order::planes;
    const int64_t image = planes ? place(v).first_image : 0, per_image = planes ? rest_ : positions_;
    const int64_t begin = planes ? 0 : v * kWidth<A>, skipped = planes ? whole_ * kWidth<A> : 0;
    const int64_t end = planes ? images_sharing(place(v)) * rest_ : images_ * positions_;
    const int used = int(min64(kWidth<A>, end - begin));
    for (int i = 0; i < kWidth<A>; ++i) {
      const int64_t n = begin + min64(i, used - 1), p = skipped + n % per_image, columns = map_.shape[3];
      lane[i] = at<T>(map_, first_image_ + image + n / per_image, 0, p / columns) + p % columns * map_.stride[3];
    }
    return used;
  }

  // All channels of a vector, one after the other.
  template <class T>
  void load(int64_t v, A* tile) const {
    constexpr int n = kWidth<A>;
    const int64_t channels = map_.shape[1], stride = map_.stride[1];
    if (is_contiguous(v)) {
      const T* p = contiguous<T>(v);
      for (int64_t c = 0; c < channels; ++c, p += stride) Access<A, A>::store(tile + c * n, Access<A, T>::load(p));
      return;
    }
    const T* lane[n];
    const int used = lanes(v, lane);
    if (order_ == Order::channels) return load_rows<T>(lane, used, channels, tile);
    for (int64_t c = 0; c < channels; ++c) {
      for (int i = 0; i < n; ++i) tile[c * n + i] = i < used ? A(to_float(lane[i][c * stride])) : A(0);
    }
  }

  // Transposes a row of channels for each lane; all but the first `used` lanes are idle.
  template <class T>
  static void load_rows(const T* const* row, int used, int64_t channels, A* tile) {
    constexpr int n = kWidth<A>;
    int64_t c = 0;
    for (; c + n <= channels; c += n) {
      Vector<A> block[n];
      for (int i = 0; i < n; ++i) block[i] = i < used ? Access<A, T>::load(row[i] + c) : Vector<A>{};
      transpose(block);
      for (int i = 0; i < n; ++i) Access<A, A>::store(tile + (c + i) * n, block[i]);
    }
    for (; c < channels; ++c) {
      for (int i = 0; i < n; ++i) tile[c * n + i] = i < used ? A(to_float(row[i][c])) : A(0);
    }
  }

  // The ends of planes, copied while the vectors before them are in the caches: at the time of the vector that shares
  // them, the planes of some images are there no more. `kept` has a row of all channels for each lane.

  // After the last whole vector of an image.
  template <class T>
  void keep_rest(int64_t v, A* kept) const {
    if (rest_ == 0 || !is_contiguous(v) || (place(v).vector + 1) % whole_ != 0) return;
    const int64_t channels = map_.shape[1];
    A* row = kept + place(v).vector / whole_ * rest_ * channels;
    for (int64_t i = 0; i < rest_; ++i, row += channels) {
      const T* from = contiguous<T>(v) + kWidth<A> + i;
      for (int64_t c = 0; c < channels; ++c, from += map_.stride[1]) row[c] = A(to_float(*from));
    }
  }

  // Before the vector that shares them, if keep_rest was called from vector `first` on. Returns how many are not idle.
  template <class T>
  int complete_rest(int64_t v, int64_t first, A* kept) const {
    const T* lane[kWidth<A>];
    const int used = lanes(v, lane);
    const bool within = place(first).first_image == place(v).first_image;  // `first` comes after some of the images
    const int missing = whole_ == 0 ? used : within ? int(place(first).vector / whole_ * rest_) : 0;
    const int64_t channels = map_.shape[1];
    for (int i = 0; i < missing; ++i) {
      for (int64_t c = 0; c < channels; ++c) kept[i * channels + c] = A(to_float(lane[i][c * map_.stride[1]]));
    }
    return used;
  }

  // Memory that is wanted later, to be fetched while vector v is transformed: a line, or part of one, for every bin of
  // the half spectrum. `step` is in bytes.
  struct Ahead {
    uintptr_t at;
    int64_t step;
    SKD_INLINE void fetch() {
      __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);  // not into the first level
      at += step;
    }
  };
  Ahead ahead(int64_t v) const {
    const int64_t size = bytes_of(map_.dtype), next = (v + 1) * kWidth<A>;
    if (order_ == Order::channels && next < images_ * positions_) {  // the next vector's rows: two numbers make a bin
      const int64_t p = next % positions_, columns = map_.shape[3];
      const int64_t row = p / columns * map_.stride[2] + p % columns * map_.stride[3];
      return {address(next / positions_, row), 2 * kWidth<A> * size};
    }
    if (is_contiguous(v)) {  // of two vectors in every plane, which share a line: half the planes, then the others
      const int64_t half = place(v).vector % whole_ % 2, later = place(v).vector % whole_ - half + kVectorsAhead;
      const int64_t image = image_of(place(v)) + later / whole_;
      const int64_t plane = half * (map_.shape[1] / 2) * map_.stride[1];
      if (image < images_) return {address(image, plane + later % whole_ * kWidth<A>), map_.stride[1] * size};
    }
    return {address(0, 0), 0};
  }

 private:
  // Of planes: the first of the images whose rests share a vector, and which of these images' vectors it is.
  struct Place {
    int64_t first_image, vector;
  };
  Place place(int64_t v) const {
    const int64_t vectors = sharing_ * whole_ + (rest_ > 0);
    return {v / vectors * sharing_, v % vectors};
  }
  int64_t images_sharing(Place p) const { return min64(sharing_, images_ - p.first_image); }
  int64_t image_of(Place p) const { return p.first_image + p.vector / whole_; }

  // Of a number of an image, as an integer, for it may lie beyond the map.
  uintptr_t address(int64_t image, int64_t offset) const {
    return uintptr_t(map_.data) + ((first_image_ + image) * map_.stride[0] + offset) * bytes_of(map_.dtype);
  }

  // How long before they are wanted planes are fetched: an image before, a large one would not stay in the second-level
  // cache.
  static constexpr int64_t kVectorsAhead = 4;  // even

  Map map_;
  int64_t first_image_, images_, positions_;
  Order order_;
  int64_t whole_, rest_;  // vectors in a plane, and positions at its end
  int64_t sharing_;       // images whose rests share a vector
};

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd
