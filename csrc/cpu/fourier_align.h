// The operation's arguments, and the kernels compiled for each instruction set.
#pragma once

#include <cstddef>
#include <memory>

#include "common/fourier_layer.h"

namespace skd {

struct FourierLayer : FourierArguments {
  std::shared_ptr<const void> prepared;  // by the kernel: twiddles, weights
};

// A layer is cut into items that depend on its maps alone, so that sums are the same for any number of threads.
struct FourierKernel {
  std::shared_ptr<const void> (*prepare)(const FourierArguments&);
  int64_t (*items)(const FourierLayer&);
  size_t (*scratch_bytes)(const FourierLayer&);
  // The item's share of the layer's sum; and, where spectra are wanted, of its magnitudes' sums [2][H][W//2+1].
  // `goes_on`: this thread does the next item after it.
  double (*run)(const FourierLayer&, int64_t item, bool goes_on, void* scratch, double* spectra);
};

namespace baseline {
extern const FourierKernel fourier_kernel;
}
#if defined(SKD_X86_KERNELS)
namespace avx2 {
extern const FourierKernel fourier_kernel;
}
namespace avx512 {
extern const FourierKernel fourier_kernel;
}
#endif

}  // namespace skd
