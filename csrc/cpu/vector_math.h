// Functions of vectors that the instruction sets lack.
#pragma once

#include <cmath>

#include "common/fourier_compare.h"
#include "cpu/simd.h"

namespace skd {
namespace {

template <class V, class F>
inline V lane_by_lane(V x, F function) {
  for (int i = 0; i < int(sizeof(V) / sizeof(x[0])); ++i) x[i] = function(x[i]);
  return x;
}

template <class V>
inline V power_of_lanes(V x, Element<V> exponent) {
  typedef Element<V> A;
  if (exponent == A(0.5)) return lane_by_lane(x, [](A number) { return std::sqrt(number); });
  return lane_by_lane(x, [=](A number) { return std::pow(number, exponent); });
}

template <>
struct Functions<SKD_ISA::Vector<float>> {
  typedef SKD_ISA::Vector<float> V;
  typedef SKD_ISA::VectorOf<float>::index Index;

  // To about 2e-7, from an approximation and a step of Newton's, for normal numbers; a division and a root would take
  // longer than all else that is done to a bin.
  static SKD_INLINE V inverse_root(V x) {
    const V y = approximate_inverse_root(x);
    return y * (1.5f - 0.5f * x * y * y);
  }

  static SKD_INLINE V approximate_inverse_root(V x) {
#if SKD_AVX512
    return V(_mm512_maskz_rsqrt14_ps(0xffff, __m512(x)));
#elif defined(__AVX2__)
    return V(_mm256_rsqrt_ps(__m256(x)));
#elif defined(__x86_64__)
    return V(_mm_rsqrt_ps(__m128(x)));
#else
    return lane_by_lane(x, [](float number) { return 1.0f / std::sqrt(number); });
#endif
  }

  static SKD_INLINE bool any(Index condition) { return SKD_ISA::any(condition); }

  // Whether squares a, b >= 0 are all within SafeSquares, and no NaN. Such numbers are in the order of their bits, so
  // one comparison finds both ends, once the upper one is the largest integer and what is above it wraps around.
  static SKD_INLINE bool all_safe(V a, V b) {
    using SKD_ISA::bit_cast;
    typedef SKD_ISA::Bits32 Bits;
    constexpr uint32_t least = 0x0da24260, largest = 0x7149f2ca, shift = 0x7fffffff - largest;  // 1e-30, 1e30
    const Index x = bit_cast<Index>(bit_cast<Bits>(a) + shift), y = bit_cast<Index>(bit_cast<Bits>(b) + shift);
    return !SKD_ISA::any((x < y ? x : y) < int32_t(least + shift));
  }

  // scale sqrt(x), and 1/sqrt(x) as inverse_root has it. The last step is an addition: a multiplication might be
  // contracted with what follows for one root and not for another, and roots of equal numbers must be equal.
  static SKD_INLINE V root(V x, float scale, V& inverse) {
    const V y = approximate_inverse_root(x), r = x * y, correction = 0.5f - r * (0.5f * y), scaled = r * scale;
    inverse = y + y * correction;
    return scaled + scaled * correction;
  }

  // Where nothing needs the inverse. The exact instruction runs beside the others, takes 0 as well and is noted by the
  // processor (RangeFlags) for subnormal numbers only; with 16 lanes it would outlast the others.
  static SKD_INLINE V square_root(V x) {
#if SKD_AVX512
    V unused;
    return root(x, 1, unused);
#elif defined(__AVX2__)
    return V(_mm256_sqrt_ps(__m256(x)));
#elif defined(__x86_64__)
    return V(_mm_sqrt_ps(__m128(x)));
#else
    return lane_by_lane(x, [](float number) { return std::sqrt(number); });
#endif
  }

  static SKD_INLINE V magnitude(Complex<V> z) {
    const V x = z.re * z.re + z.im * z.im;
    return __builtin_expect(all_safe(x, x), true) ? square_root(x) : polar(z).size;
  }

  // For x >= 0: log(1 + x) with the rounding of 1 + x put right, by the series of the inverse hyperbolic tangent.
  static SKD_INLINE V log_1p(V x) {
    using SKD_ISA::bit_cast;
    const V y = x + 1.0f, lost = x - (y - 1.0f);
    const Index exponent = (bit_cast<Index>(y) - 0x3f3504f3) >> 23;  // y / 2^exponent is in [sqrt(1/2), sqrt(2))
    const V f = bit_cast<V>(bit_cast<Index>(y) - (exponent << 23)) - 1.0f;
    const V s = f / (f + 2.0f), z = s * s;
    const V series = 2.0f * s * (1.0f + z * (1 / 3.0f + z * (1 / 5.0f + z * (1 / 7.0f + z * (1 / 9.0f)))));
    const V e = __builtin_convertvector(exponent, V);
    const V log = e * 0.693359375f + (e * -2.12194440e-4f + (lost / y + series));  // ln 2 in two parts
    return x <= 3e38f ? log : x;                                                   // infinity, NaN
  }

  static V power(V x, float exponent) { return power_of_lanes(x, exponent); }
};

template <>
struct Functions<SKD_ISA::Vector<double>> {
  typedef SKD_ISA::Vector<double> V;
  static bool any(SKD_ISA::VectorOf<double>::index condition) { return SKD_ISA::any(condition); }
  static V inverse_root(V x) {
    return lane_by_lane(x, [](double number) { return 1.0 / std::sqrt(number); });
  }
  static V magnitude(Complex<V> z) { return polar(z).size; }
  static V log_1p(V x) {
    return lane_by_lane(x, [](double number) { return std::log1p(number); });
  }
  static V power(V x, double exponent) { return power_of_lanes(x, exponent); }
};

}  // namespace
}  // namespace skd
