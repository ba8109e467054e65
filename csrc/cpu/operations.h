// The operations: their items on several threads, and the items' shares added up in order.
#pragma once

#include <cstdint>
#include <vector>

#include "common/fourier_layer.h"
#include "common/intensity_map.h"

namespace skd {

// Calls that move more bytes than this write their gradients past the caches.
extern int64_t stream_above;

// The losses go to `out`: one number per layer, or their sum; float64 or float32. Gradients go where the layers say.
void spectral_align(const std::vector<AlignArguments>& layers, int threads, uintptr_t out, bool out_is_double,
                    bool reduce);

// The same, one number per layer; spectra go where the layers say, in the dtype of the losses.
void fourier_align(const std::vector<FourierArguments>& layers, int threads, uintptr_t out, bool out_is_double);

// Without `per_image` the mean over the images goes to `out`, without their dimension.
void spectral_intensity(const IntensityArguments& x, bool per_image, int threads);

}  // namespace skd
