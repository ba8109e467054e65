#include "cpu/operations.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <new>
#include <numeric>

#include "cpu/instruction_sets.h"
#include "cpu/parallel_for.h"

namespace skd {
namespace {

// Reused by all calls of a thread.
void* scratch_of_this_thread(size_t bytes) {
  thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    const size_t rounded = (bytes + 63) / 64 * 64;
    memory.reset();
    capacity = 0;
    memory.reset(std::aligned_alloc(64, rounded));
    if (!memory) throw std::bad_alloc();
    capacity = rounded;
  }
  return memory.get();
}

// What one core has of it. The system's own sysconf adds up all of a socket's on some machines, so Linux's files go
// first.
int64_t last_level_cache() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t amount = 0;
  char unit = ' ';
  if (file >> amount >> unit && (unit == 'K' || unit == 'M')) return unit == 'K' ? amount << 10 : amount << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 32 << 20;
}

int64_t bytes_of(const Map& map) {
  const int64_t size = map.dtype == DType::float64 ? 8 : map.dtype == DType::float32 ? 4 : 2;
  return size * map.shape[0] * map.shape[1] * map.shape[2] * map.shape[3];
}

constexpr int64_t kNumbersPerThread = 16384;  // below this a second thread costs more than it does

template <class Number>
void write(uintptr_t out, size_t place, bool is_double, Number value) {
  if (is_double) {
    reinterpret_cast<double*>(out)[place] = double(value);
  } else {
    reinterpret_cast<float*>(out)[place] = float(value);
  }
}

// As many threads as find enough to do.
int useful_threads(int threads, int64_t numbers) {
  return int(std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(1, numbers / kNumbersPerThread)));
}

// The items of all layers, one layer after the other. Every item has a share of the sum of its own, and they are added
// in order: the same sum for any number of threads.
class Items {
 public:
  void add_layer(int64_t items) {
    first_.push_back(first_.back() + items);
    shares_.resize(size_t(first_.back()));
  }
  int64_t count(size_t layer) const { return first_[layer + 1] - first_[layer]; }
  double sum(size_t layer) const {
    return std::accumulate(shares_.begin() + first_[layer], shares_.begin() + first_[layer + 1], 0.0);
  }

  // share = run(layer, item of the layer, whether this thread goes on with the layer's next item)
  template <class Run>
  void run(int threads, Run run) {
    parallel_for(first_.back(), threads, [&](int64_t begin, int64_t end) {
      size_t layer = 0;
      for (int64_t item = begin; item < end; ++item) {
        while (item >= first_[layer + 1]) ++layer;
        shares_[size_t(item)] = run(layer, item - first_[layer], item + 1 < std::min(end, first_[layer + 1]));
      }
    });
  }

 private:
  std::vector<int64_t> first_{0};
  std::vector<double> shares_;
};

int64_t numbers_of(const Map& map) { return map.shape[0] * map.shape[1] * map.shape[2] * map.shape[3]; }

}  // namespace

// Half the last level, since the rest of the program wants room there too.
int64_t stream_above = last_level_cache() / 2;

void spectral_align(const std::vector<AlignArguments>& arguments, int threads, uintptr_t out, bool out_is_double,
                    bool reduce) {
  const AlignKernel& kernel = instruction_set_in_use().spectral_align;
  int64_t bytes = 0;
  for (const AlignArguments& layer : arguments) bytes += 2 * bytes_of(layer.student) + bytes_of(layer.teacher);
  std::vector<AlignLayer> layers;
  for (const AlignArguments& layer : arguments) {
    layers.push_back({layer, layer.gradient.data != nullptr && bytes > stream_above});
  }

  Items items;
  size_t scratch = 0;
  int64_t numbers = 0;
  for (const AlignLayer& layer : layers) {
    const bool empty = layer.student.shape[0] == 0;
    items.add_layer(empty ? 0 : kernel.items(layer));
    if (!empty) scratch = std::max(scratch, kernel.scratch_bytes(layer));
    numbers += std::max(numbers_of(layer.student), numbers_of(layer.teacher));
  }
  items.run(useful_threads(threads, numbers), [&](size_t layer, int64_t item, bool) {
    return kernel.run(layers[layer], item, scratch_of_this_thread(scratch));
  });

  double total = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const double loss = items.sum(l) * layers[l].loss_scale;
    total += loss;
    if (!reduce) write(out, l, out_is_double, loss);
  }
  if (reduce) write(out, 0, out_is_double, total);
}

void fourier_align(const std::vector<FourierArguments>& arguments, int threads, uintptr_t out, bool out_is_double) {
  const FourierKernel& kernel = instruction_set_in_use().fourier_align;
  std::vector<FourierLayer> layers;
  Items items;
  size_t scratch = 0;
  int64_t numbers = 0;
  for (const FourierArguments& each : arguments) {
    const bool empty = each.student.shape[0] == 0;
    layers.push_back({each, empty ? nullptr : kernel.prepare(each)});
    items.add_layer(empty ? 0 : kernel.items(layers.back()));
    if (!empty) scratch = std::max(scratch, kernel.scratch_bytes(layers.back()));
    numbers += std::max(numbers_of(each.student), numbers_of(each.teacher));
  }
  const auto bins_of = [](const FourierLayer& layer) {  // of both maps
    return layer.spectra == nullptr ? 0 : 2 * layer.student.shape[2] * (layer.student.shape[3] / 2 + 1);
  };
  std::vector<std::vector<double>> spectra;  // per layer, of every item
  for (size_t l = 0; l < layers.size(); ++l) spectra.emplace_back(size_t(bins_of(layers[l]) * items.count(l)));
  items.run(useful_threads(threads, numbers), [&](size_t l, int64_t item, bool goes_on) {
    double* const sums = layers[l].spectra == nullptr ? nullptr : spectra[l].data() + item * bins_of(layers[l]);
    return kernel.run(layers[l], item, goes_on, scratch_of_this_thread(scratch), sums);
  });

  for (size_t l = 0; l < layers.size(); ++l) {
    write(out, l, out_is_double, items.sum(l) * layers[l].loss_scale);
    const int64_t bins = bins_of(layers[l]), *n = layers[l].student.shape;
    const double planes = double(std::max<int64_t>(1, n[0] * std::min(n[1], layers[l].teacher.shape[1])));
    for (int64_t i = 0; i < bins; ++i) {
      double magnitude = 0;
      for (size_t at = size_t(i); at < spectra[l].size(); at += size_t(bins)) magnitude += spectra[l][at];
      write(uintptr_t(layers[l].spectra), size_t(i), out_is_double, magnitude / planes);
    }
  }
}

void spectral_intensity(const IntensityArguments& x, bool per_image, int threads) {
  const int64_t images = x.map.shape[0], bins = x.bins();
  if (images == 0) return;
  const InstructionSet& set = instruction_set_in_use();
  const IntensityKernel& kernel = x.axis == Axis::channel ? set.channel_intensity : set.space_intensity;
  const std::shared_ptr<const void> prepared = kernel.prepare(x);
  const int64_t averaged = per_image ? 1 : images, rows = images / averaged, parts = kernel.parts(x, averaged);
  const size_t scratch = kernel.scratch_bytes(x, prepared.get());
  std::vector<double> sums(size_t(rows * parts * bins));
  parallel_for(rows * parts, useful_threads(threads, numbers_of(x.map)), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      kernel.run(x, prepared.get(), item / parts * averaged, averaged, item % parts, scratch_of_this_thread(scratch),
                 sums.data() + item * bins);
    }
  });
  const double scale = x.scale / double(x.transforms() * averaged);
  for (int64_t row = 0; row < rows; ++row) {  // the sums of its first part become those of all
    double* const sum = sums.data() + row * parts * bins;
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t k = 0; k < bins; ++k) sum[k] += sum[part * bins + k];
    }
    for (int64_t k = 0; k < bins; ++k) {
      write(uintptr_t(x.out), size_t(row * bins + k), x.map.dtype == DType::float64, sum[k] * scale);
    }
  }
}

}  // namespace skd
