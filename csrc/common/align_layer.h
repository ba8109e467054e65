// The arguments of spectral_align, as they cross from Python.
#pragma once

#include <cstdint>

namespace skd {

enum class DType : int { float32, float64, bfloat16, float16 };

// A tensor [B, C, H, W] in somebody else's memory; strides count elements.
struct Map {
  char* data;
  DType dtype;
  int64_t shape[4];
  int64_t stride[4];
};

// One layer, with the coefficients of skd.reference.spectral_align:
//   loss = loss_scale * sum d (d + row_weight S),   gradient = gradient_scale * P^T (d + row_weight S)
struct AlignArguments {
  Map student, teacher, gradient;  // gradient.data is null where none is wanted
  double row_weight, loss_scale, gradient_scale;
};

}  // namespace skd
