// What fourier_align does with a column of the half spectra of a vector of planes.
#pragma once

#include "cpu/vector_math.h"

namespace skd {
namespace SKD_ISA {
namespace {

// Bins side by side; the spectra are those of transforms that are not normalised.
template <class A>
struct BinColumn {
  typedef Complex<Vector<A>> Bin;
  int64_t bins;
  Bin* student;        // with Compare::complex, the difference; becomes the gradient
  const Bin* teacher;  // not used by Compare::complex without magnitudes
  const A* weights;
  Part<A>* magnitudes[2];  // where those of student and teacher are added, or null
};

// The same for all columns of a layer.
template <class A>
struct Comparison {
  A norm;   // what a logarithm's argument needs; all else has it in the weights of the sums
  A focal;  // 0 for none
};

template <class V, class A>
SKD_INLINE Complex<V> scaled(Complex<V> x, A scale) {
  return {x.re * scale, x.im * scale};
}

// Bins of any size.
template <Compare kCompare, bool kMagnitudes, class A>
SKD_INLINE Compared<Vector<A>> compare_any(const BinColumn<A>& column, int64_t i, A norm) {
  if constexpr (kCompare == Compare::complex) {
    return compare_complex(column.student[i], column.teacher[kMagnitudes ? i : 0], kMagnitudes);
  } else if constexpr (kCompare == Compare::log_magnitude) {
    return compare_magnitudes(scaled(column.student[i], norm), scaled(column.teacher[i], norm), true);
  } else {
    return compare_magnitudes(column.student[i], column.teacher[i], false);
  }
}

// The largest squared difference so far, of every plane.
template <class A, Compare kCompare>
void find_largest(const BinColumn<A>& column, A norm, Vector<A>& largest) {
  for (int64_t i = 0; i < column.bins; ++i) {
    const Vector<A> squared = compare_any<kCompare, false>(column, i, norm).squared;
    largest = squared > largest ? squared : largest;
  }
}

// Replaces the bins by the gradient with respect to them, and adds up losses.
template <class A, Compare kCompare, bool kMagnitudes>
void compare_column(const BinColumn<A>& column, Comparison<A> with, Vector<A> largest, DoubleSum<A>& sum) {
  typedef Vector<A> V;
  for (int64_t first = 0; first < column.bins; first += kTermsInFloat) {
    V part{};
    const auto finish = [&](int64_t i, V squared, Complex<V> direction, V along, V student, V teacher) SKD_INLINED {
      V weight = V{} + column.weights[i];
      if (with.focal != 0) weight *= focal_weight(squared, largest, with.focal);
      part += weight * squared;
      weight *= along;
      column.student[i] = {direction.re * weight, direction.im * weight};
      if (kMagnitudes) {
        column.magnitudes[0][i] += folded<A>(student);
        column.magnitudes[1][i] += folded<A>(teacher);
      }
    };
    const int64_t last = column.bins - first < kTermsInFloat ? column.bins : first + kTermsInFloat;
    for (int64_t i = first; i < last; ++i) {
      if constexpr (kCompare != Compare::complex && sizeof(A) == sizeof(float)) {
        const Complex<V> s = column.student[i], t = column.teacher[i];
        const V a = s.re * s.re + s.im * s.im, b = t.re * t.re + t.im * t.im;
        if (__builtin_expect(Functions<V>::all_safe(a, b), true)) {
          constexpr bool logarithmic = kCompare == Compare::log_magnitude;
          const A scale = logarithmic ? with.norm : A(1);
          V inverse, unused;
          const V student = Functions<V>::root(a, scale, inverse), teacher = Functions<V>::root(b, scale, unused);
          const MagnitudeDifference<V> d = difference_of_magnitudes(student, teacher, logarithmic);
          finish(i, d.value * d.value, s, d.along * inverse, student, teacher);
          continue;
        }
      }
      const Compared<V> bin = compare_any<kCompare, kMagnitudes>(column, i, with.norm);
      finish(i, bin.squared, bin.direction, V{} + A(1), bin.student, bin.teacher);
    }
    sum.add(part);
  }
}

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd
