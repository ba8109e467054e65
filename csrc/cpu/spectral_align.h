// The operation's arguments, and the kernels compiled for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/align_layer.h"

namespace skd {

struct AlignLayer : AlignArguments {
  // Write the gradient past the caches: where a call's maps are larger than these, reading the gradient's lines before
  // they are overwritten, and keeping them after, is wasted.
  bool stream_gradient;
};

// A layer is cut into items that depend on its maps alone, so that sums are the same for any number of threads.
struct AlignKernel {
  int64_t (*items)(const AlignLayer&);
  size_t (*scratch_bytes)(const AlignLayer&);
  double (*run)(const AlignLayer&, int64_t item, void* scratch);  // the item's share of the layer's sum
};

namespace baseline {
extern const AlignKernel align_kernel;
}
#if defined(SKD_X86_KERNELS)
namespace avx2 {
extern const AlignKernel align_kernel;
}
namespace avx512 {
extern const AlignKernel align_kernel;
}
#endif

}  // namespace skd
