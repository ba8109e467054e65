// What fourier_align does with a bin of both spectra: for numbers and for vectors, on the host and on the device.
#pragma once

#include <cmath>

#include "common/fft_codelets.h"
#include "common/fourier_layer.h"

namespace skd {
namespace {

// --- Functions ---

// What the platform brings for its vectors, as it is here for numbers.
template <class V>
struct Functions {
  SKD_HD static SKD_INLINE V inverse_root(V x) {
#if defined(__CUDA_ARCH__)
    return V(rsqrt(x));
#else
    return V(1) / std::sqrt(x);
#endif
  }
  SKD_HD static SKD_INLINE bool any(bool condition) { return condition; }
  SKD_HD static SKD_INLINE V log_1p(V x) { return V(::log1p(x)); }
  SKD_HD static SKD_INLINE V power(V x, V exponent) { return V(::pow(x, exponent)); }
};

// --- Magnitudes ---

// Squares of numbers outside of these overflow, or lose bits to underflow; they are multiplied with a power of two.
template <class A>
struct SafeSquares;
template <>
struct SafeSquares<float> {
  static constexpr float least = 1e-30f, largest = 1e30f, up = 0x1p100f, down = 0x1p-100f;
};
template <>
struct SafeSquares<double> {
  static constexpr double least = 1e-280, largest = 1e280, up = 0x1p700, down = 0x1p-700;
};

// |z|, and z/|z|, which is 0 for z = 0.
template <class V>
struct Polar {
  V size;
  Complex<V> unit;
};

template <class V>
SKD_HD SKD_INLINE Polar<V> polar(Complex<V> z) {
  using A = Element<V>;
  using Safe = SafeSquares<A>;
  V x = z.re * z.re + z.im * z.im;
  V y = Functions<V>::inverse_root(x);
  if (!Functions<V>::any((x < Safe::least) | (x > Safe::largest))) return {x * y, {z.re * y, z.im * y}};
  const V one = V{} + A(1);
  const V scale = x < Safe::least ? V{} + Safe::up : x > Safe::largest ? V{} + Safe::down : one;
  const V back = x < Safe::least ? V{} + Safe::down : x > Safe::largest ? V{} + Safe::up : one;
  z = {z.re * scale, z.im * scale};
  x = z.re * z.re + z.im * z.im;
  y = x == A(0) ? V{} : Functions<V>::inverse_root(x == A(0) ? one : x);
  return {x * y * back, {z.re * y, z.im * y}};
}

// --- The comparison of a bin ---

// The gradient with respect to the student's bin is `direction` times the weight; half of it, for the factor 2 is in
// gradient_scale.
template <class V>
struct Compared {
  V squared;  // |difference|^2
  Complex<V> direction;
  V student, teacher;  // magnitudes; with Compare::complex only where asked for
};

// Of two magnitudes or of their log1p: the difference, and half the derivative of its square by the first magnitude.
template <class V>
struct MagnitudeDifference {
  V value, along;
};

template <class V>
SKD_HD SKD_INLINE MagnitudeDifference<V> difference_of_magnitudes(V a, V b, bool logarithmic) {
  using A = Element<V>;
  const V difference = a - b;
  if (!logarithmic) return {difference, difference};
  // log1p(a) - log1p(b), without cancellation and for any size: the logarithm of the larger over the smaller.
  const V log = Functions<V>::log_1p(difference < A(0) ? -difference / (a + A(1)) : difference / (b + A(1)));
  const V value = difference < A(0) ? -log : log;
  return {value, value / (a + A(1))};
}

template <class V>
SKD_HD SKD_INLINE Compared<V> compare_magnitudes(Complex<V> s, Complex<V> t, bool logarithmic) {
  const Polar<V> a = polar(s);
  const V b = polar(t).size;
  const MagnitudeDifference<V> d = difference_of_magnitudes(a.size, b, logarithmic);
  return {d.value * d.value, {a.unit.re * d.along, a.unit.im * d.along}, a.size, b};
}

// d = s - t is given beside t, so that nearly equal maps keep their difference.
template <class V>
SKD_HD SKD_INLINE Compared<V> compare_complex(Complex<V> d, Complex<V> t, bool with_magnitudes) {
  Compared<V> result{d.re * d.re + d.im * d.im, d, V{}, V{}};
  if (with_magnitudes) {
    result.student = polar(d + t).size;
    result.teacher = polar(t).size;
  }
  return result;
}

// The focal weight of a squared difference, `largest` being the largest of its plane: 0 in a plane without differences.
template <class V, class A>
SKD_HD SKD_INLINE V focal_weight(V squared, V largest, A focal) {
  const V ratio = squared / (largest == A(0) ? V{} + A(1) : largest);  // 0 where all of the plane is
  return focal == A(2) ? ratio : Functions<V>::power(ratio, focal * A(0.5));
}

// Columns 0 < kx < W/2 of the half spectrum stand for two of the whole.
SKD_HD SKD_INLINE bool is_inner(int kx, int columns) { return kx > 0 && 2 * kx < columns; }

}  // namespace
}  // namespace skd
