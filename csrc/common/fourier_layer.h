// The arguments of fourier_align, as they cross from Python.
#pragma once

#include "common/align_layer.h"

namespace skd {

enum class Compare : int { complex, magnitude, log_magnitude };

// One layer, with the coefficients of skd.reference.fourier_align.
struct FourierArguments {
  Map student, teacher, gradient;  // gradient.data is null where none is wanted
  const char* bands;               // [H, W//2+1] in the losses' dtype, or null
  char* spectra;                   // [2, H, W//2+1] in the losses' dtype, or null
  Compare compare;
  double focal;  // 0 for none
  double inner_weight, loss_scale, gradient_scale;
};

}  // namespace skd
