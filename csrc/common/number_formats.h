// 16-bit floating formats as bits, and their conversion to and from float, for processors without instructions for it.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/channel_pool.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace skd {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

SKD_HD static inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

SKD_HD static inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

SKD_HD static inline float to_float(float x) { return x; }
SKD_HD static inline double to_float(double x) { return x; }
SKD_HD static inline float to_float(bfloat16 x) { return bits_float(uint32_t(x.bits) << 16); }

SKD_HD static inline float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // infinity, NaN
  // The difference of the biases, 127 - 15, is added to the exponent. Subnormals are made of an integer: arithmetic
  // with float's own would be noted by the processor (cpu/range_flags.h).
  const uint32_t bits = magnitude < 0x400 ? float_bits(float(magnitude) * 0x1p-24f) : (magnitude << 13) + (112u << 23);
  return bits_float(sign | bits);
#endif
}

SKD_HD static inline void from_float(float x, float& out) { out = x; }
SKD_HD static inline void from_float(double x, double& out) { out = x; }
SKD_HD static inline void from_float(double x, float& out) { out = float(x); }

SKD_HD static inline void from_float(float x, bfloat16& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out.bits = uint16_t(bits >> 16 | 0x40);  // a NaN stays a NaN
  } else {
    out.bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
  }
#endif
}

SKD_HD static inline void from_float(float x, float16& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) {
    out.bits = sign | 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520, the first number that rounds to infinity
    out.bits = sign | 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the subnormal's bits at the end of the sum
    out.bits = sign | uint16_t(float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000);
  } else {
    out.bits = sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
#endif
}

// Double rounding (to float, then to 16 bits) is avoided by nobody who mixes float64 with 16-bit maps; it costs half
// an ulp of float there.
SKD_HD static inline void from_float(double x, bfloat16& out) { from_float(float(x), out); }
SKD_HD static inline void from_float(double x, float16& out) { from_float(float(x), out); }

}  // namespace skd
