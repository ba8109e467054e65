// An IntensityKernel made of a class template, for maps in float and in double.
#pragma once

#include <memory>

#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "cpu/spectral_intensity.h"

namespace skd {
namespace SKD_ISA {
namespace {

// Of the images that are averaged, each with sums of its own: more threads than these have nothing to do.
constexpr int64_t kMostParts = 16;

template <class V>
void clear(V* magnitudes, int64_t bins) {
  for (int64_t k = 0; k < bins; ++k) magnitudes[k] = V{};
}

// Pool<A> is what one shape needs. It has
//   Pool(int64_t length, int64_t width)            of the transform, the width of one over channels being 1
//   static int64_t groups(x, images)               what can be added on its own
//   static int64_t parts(groups)
//   struct Scratch { Scratch(x, pool, memory); Vector<A>* magnitudes; size_t bytes; }
//   void add(x, first_image, images, first, last, scratch, sums)   groups [first, last)
template <template <class> class Pool>
class PooledIntensity {
 public:
  static constexpr IntensityKernel kernel() { return {prepare, parts, scratch_bytes, run}; }

 private:
  static bool in_double(const IntensityArguments& x) { return x.map.dtype == DType::float64; }

  // That of a thread's last few shapes is kept: the roots of unity take as long as several transforms.
  static std::shared_ptr<const void> prepare(const IntensityArguments& x) {
    struct Kept {
      bool in_double;
      int64_t length, width;
      std::shared_ptr<const void> pool;
    };
    thread_local Kept kept[8];
    thread_local int next = 0;
    const bool over_channels = x.axis == Axis::channel;
    const int64_t length = x.map.shape[over_channels ? 1 : 2], width = over_channels ? 1 : x.map.shape[3];
    for (const Kept& one : kept) {
      if (one.pool && one.in_double == in_double(x) && one.length == length && one.width == width) return one.pool;
    }
    Kept& oldest = kept[next];
    oldest = {in_double(x), length, width, nullptr};
    if (in_double(x)) {
      oldest.pool = std::make_shared<Pool<double>>(length, width);
    } else {
      oldest.pool = std::make_shared<Pool<float>>(length, width);
    }
    next = (next + 1) % 8;
    return oldest.pool;
  }

  static int64_t parts(const IntensityArguments& x, int64_t images) {
    return in_double(x) ? Pool<double>::parts(Pool<double>::groups(x, images))
                        : Pool<float>::parts(Pool<float>::groups(x, images));
  }

  static size_t scratch_bytes(const IntensityArguments& x, const void* pool) {
    if (in_double(x)) return typename Pool<double>::Scratch(x, *static_cast<const Pool<double>*>(pool), nullptr).bytes;
    return typename Pool<float>::Scratch(x, *static_cast<const Pool<float>*>(pool), nullptr).bytes;
  }

  static void run(const IntensityArguments& x, const void* pool, int64_t first_image, int64_t images, int64_t part,
                  void* scratch, double* sums) {
    (in_double(x) ? run_as<double> : run_as<float>)(x, pool, first_image, images, part, scratch, sums);
  }
  template <class A>
  static void run_as(const IntensityArguments& x, const void* prepared, int64_t first_image, int64_t images,
                     int64_t part, void* memory, double* sums) {
    const auto& pool = *static_cast<const Pool<A>*>(prepared);
    const typename Pool<A>::Scratch scratch(x, pool, memory);
    clear(scratch.magnitudes, x.bins());
    const int64_t groups = Pool<A>::groups(x, images), parts = Pool<A>::parts(groups);
    pool.add(x, first_image, images, part * groups / parts, (part + 1) * groups / parts, scratch, sums);
  }
};

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd
