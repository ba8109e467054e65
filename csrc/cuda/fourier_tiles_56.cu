// fourier_align for planes of the lengths 56.
#include "cuda/fourier_align.h"
#include "cuda/fourier_tiles.h"
#include "cuda/launch.h"

namespace skd {

void launch_fourier_56(const FourierLaunch& launch, cudaStream_t stream) {
  allow_shared_memory(fourier_tiles_kernel<56>, launch.shared_bytes);
  run(fourier_tiles_kernel<56>, dim3(unsigned(launch.blocks)), kThreads, launch.shared_bytes, stream, launch.table);
}

}  // namespace skd
