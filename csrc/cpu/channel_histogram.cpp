// Bins are found for some numbers at once, in vectors, and counted one by one. The map is read once, in the order of
// its memory.
#include "cpu/channel_histogram.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/number_formats.h"
#include "cpu/parallel_for.h"

namespace skd {
namespace {

constexpr int64_t kAtOnce = 64;  // numbers whose bins are found together; counts of so many positions stay in the cache

// The bins of `count` numbers, `step` apart, each counted from `apart` further on than the one before.
template <class A, class T>
void find_bins(const T* x, int64_t step, int64_t count, A offset, A scale, int bins, int apart, int32_t* found) {
  const auto find = [&](int64_t i, T number) {
    const A place = offset + A(to_float(number)) * scale;
    found[i] = int32_t(std::min(std::max(A(0), place), A(bins - 1))) + int32_t(i) * apart;  // 0 for a NaN
  };
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) find(i, x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) find(i, x[i * step]);
  }
}

template <class T>
void count_image(const HistogramArguments& x, int64_t image, int64_t* holding) {
  typedef std::conditional_t<std::is_same<T, double>::value, double, float> A;
  const int64_t *n = x.map.shape, *stride = x.map.stride;
  const A offset = A(x.offset[image]), scale = A(x.scale[image]);
  const bool one_line = n[2] == 1 || stride[2] == n[3] * stride[3], adjacent = stride[1] == 1;
  const int64_t lines = one_line ? 1 : n[2], positions = n[2] * n[3] / lines, most = adjacent ? 1 : kAtOnce;
  thread_local std::vector<uint32_t> counts;
  counts.resize(size_t(most * x.bins));
  const auto count = [&](const T* numbers, int64_t step, int64_t amount, int apart) {
    int32_t found[kAtOnce];
    find_bins(numbers, step, amount, offset, scale, int(x.bins), apart, found);
    uint32_t* const c = counts.data();
    for (int64_t i = 0; i < amount; ++i) ++c[found[i]];
  };
  for (int64_t line = 0; line < lines; ++line) {
    const T* const start = reinterpret_cast<const T*>(x.map.data) + image * stride[0] + line * stride[2];
    for (int64_t first = 0; first < positions; first += most) {
      const T* const here = start + first * stride[3];
      const int64_t amount = std::min(most, positions - first);
      std::fill(counts.begin(), counts.end(), 0);
      if (adjacent) {
        for (int64_t c = 0; c < n[1]; c += kAtOnce) count(here + c, 1, std::min(kAtOnce, n[1] - c), 0);
      } else {
        for (int64_t c = 0; c < n[1]; ++c) count(here + c * stride[1], stride[3], amount, int(x.bins));
      }
      for (int64_t i = 0; i < amount * x.bins; ++i) ++holding[counts[size_t(i)]];
    }
  }
}

}  // namespace

void count_channels(const HistogramArguments& x, int threads, int64_t* holding) {
  const int64_t images = x.map.shape[0], sizes = x.map.shape[1] + 1;
  std::vector<int64_t> found(size_t(images * sizes));
  parallel_for(images, threads, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      int64_t* const own = found.data() + image * sizes;
      switch (x.map.dtype) {
        case DType::float32: count_image<float>(x, image, own); break;
        case DType::float64: count_image<double>(x, image, own); break;
        case DType::bfloat16: count_image<bfloat16>(x, image, own); break;
        case DType::float16: count_image<float16>(x, image, own); break;
      }
    }
  });
  for (size_t i = 0; i < found.size(); ++i) holding[i % size_t(sizes)] += found[i];
}

}  // namespace skd
