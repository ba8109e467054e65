// The operation's kernels, one for each axis, compiled for each instruction set.
#pragma once

#include <cstddef>
#include <memory>

#include "common/intensity_map.h"

namespace skd {

// Images that are averaged are cut into parts that depend on the map alone: the same sums for any number of threads
// and, of an image alone, for any batch.
struct IntensityKernel {
  std::shared_ptr<const void> (*prepare)(const IntensityArguments&);
  int64_t (*parts)(const IntensityArguments&, int64_t images);
  size_t (*scratch_bytes)(const IntensityArguments&, const void* prepared);
  // Adds the part's magnitudes to sums[bins].
  void (*run)(const IntensityArguments&, const void* prepared, int64_t first_image, int64_t images, int64_t part,
              void* scratch, double* sums);
};

namespace baseline {
extern const IntensityKernel channel_intensity_kernel, space_intensity_kernel;
}
#if defined(SKD_X86_KERNELS)
namespace avx2 {
extern const IntensityKernel channel_intensity_kernel, space_intensity_kernel;
}
namespace avx512 {
extern const IntensityKernel channel_intensity_kernel, space_intensity_kernel;
}
#endif

}  // namespace skd
