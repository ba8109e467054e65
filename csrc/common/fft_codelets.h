// Fourier transforms of short lengths that are known at compile time, for numbers (CUDA: a thread holds the transform)
// and for SIMD vectors (every lane is a transform of its own).
//
//   fft_forward<N>(load, store)        X[k] = sum_j x[j] exp(-2 pi i j k / N)    load(j) -> Complex<V>, store(k, X[k])
//   fft_backward<N>(load, store)       the same with +, not normalised
//   fft_real_forward<N>(load, store)   real x, k = 0..N/2 only                   load(j) -> V, store(k, X[k])
//   fft_half_adjoint<N>(load, store)   x[j] = Re sum_{k=0}^{N/2} g[k] exp(2 pi i j k / N)    load(k) -> Complex<V>,
//                                      store(j, x[j]): its transpose, not its inverse: every bin counts once
//
// and on arrays: fft_forward<N>(x) and fft_backward<N>(x) in place, fft_real_forward<N>(x, X), fft_half_adjoint<N>(g,
// x). Order is natural on both sides. Each index is loaded once and stored once, in any order, everything loaded before
// anything is stored. Mark functors SKD_INLINED: load = [&](int j) SKD_INLINED { return row[j * stride]; }. N has prime
// factors up to 13.
//
// Everything has internal linkage (see cpu/simd.h), except Complex.
#pragma once

#include <type_traits>
#include <utility>

#include "common/channel_pool.h"

#if defined(__CUDACC__)
#define SKD_INLINE __forceinline__
#else
#define SKD_INLINE inline __attribute__((always_inline))
#endif
#define SKD_INLINED __attribute__((always_inline))

namespace skd {

// Copied part by part, for g++ would copy a pair of vectors through memory in smaller pieces. Every function is inlined
// always, so that none has external linkage.
template <class V>
struct alignas(std::is_arithmetic<V>::value ? 2 * sizeof(V) : alignof(V)) Complex {
  V re, im;
  Complex() = default;
  SKD_HD SKD_INLINE constexpr Complex(V real, V imaginary) : re(real), im(imaginary) {}
  SKD_HD SKD_INLINE constexpr Complex(const Complex& other) : re(other.re), im(other.im) {}
  SKD_HD SKD_INLINE constexpr Complex& operator=(const Complex& other) {
    re = other.re;
    im = other.im;
    return *this;
  }
};

namespace {

// --- Numbers ---

// What a vector is made of; a number is made of itself.
template <class V, bool = std::is_arithmetic<V>::value>
struct ElementOf {
  using type = V;
};
template <class V>
struct ElementOf<V, false> {
  using type = std::decay_t<decltype(std::declval<V&>()[0])>;
};
template <class V>
using Element = typename ElementOf<V>::type;

template <class V>
SKD_HD SKD_INLINE Complex<V> operator+(Complex<V> a, Complex<V> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class V>
SKD_HD SKD_INLINE Complex<V> operator-(Complex<V> a, Complex<V> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class V>
SKD_HD SKD_INLINE Complex<V> conjugate(Complex<V> a) {
  return {a.re, -a.im};
}
template <class V>
SKD_HD SKD_INLINE Complex<V> exchanged(Complex<V> a) {
  return {a.im, a.re};
}
// -i a
template <class V>
SKD_HD SKD_INLINE Complex<V> turned(Complex<V> a) {
  return {a.im, -a.re};
}
template <class V, class A>
SKD_HD SKD_INLINE Complex<V> multiply(Complex<V> a, A re, A im) {
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}

// --- Roots of unity ---

struct Root {
  double re, im;
};

// exp(-2 pi i k / n). The angle is brought below pi/4 in whole numbers; the series has an error below one ulp there.
SKD_HD constexpr Root root_of_unity(int64_t k, int64_t n) {
  k %= n;
  const int octant = int(8 * k / n);
  const int64_t part = octant % 2 == 0 ? 8 * k - octant * n : (octant + 1) * n - 8 * k;
  const double x = 0.78539816339744830962 * double(part) / double(n), x2 = x * x;
  double cosine = 0, sine = 0;
  for (int i = 20; i > 0; i -= 2) {
    cosine = (1 - cosine) * (x2 * (1.0 / (i * (i - 1))));
    sine = (1 - sine) * (x2 * (1.0 / (i * (i + 1))));
  }
  cosine = 1 - cosine;
  sine = x - x * sine;
  switch (octant) {
    case 0: return {cosine, -sine};
    case 1: return {sine, -cosine};
    case 2: return {-sine, -cosine};
    case 3: return {-cosine, -sine};
    case 4: return {-cosine, sine};
    case 5: return {-sine, cosine};
    case 6: return {sine, cosine};
    default: return {cosine, sine};
  }
}

template <int kNumerator, int kDenominator>
struct UnitRoot {
  static constexpr Root value = root_of_unity(kNumerator, kDenominator);
  static constexpr double re = value.re, im = value.im;
};

// a exp(-2 pi i k / n), without multiplications by 0 and 1.
template <int k, int n, class V>
SKD_HD SKD_INLINE Complex<V> twiddled(Complex<V> a) {
  using A = Element<V>;
  constexpr int eighths = 8 * (k % n) % n == 0 ? 8 * (k % n) / n : -1;
  constexpr double half = UnitRoot<1, 8>::re;
  if constexpr (eighths == 0) {
    return a;
  } else if constexpr (eighths == 1) {
    return {(a.re + a.im) * A(half), (a.im - a.re) * A(half)};
  } else if constexpr (eighths == 2) {
    return turned(a);
  } else if constexpr (eighths == 3) {
    return {(a.im - a.re) * A(half), (a.re + a.im) * A(-half)};
  } else if constexpr (eighths == 4) {
    return {-a.re, -a.im};
  } else {
    return multiply(a, A(UnitRoot<k % n, n>::re), A(UnitRoot<k % n, n>::im));
  }
}

// --- Loops over compile-time indices ---

template <int I>
struct Index {
  static constexpr int value = I;
  SKD_HD constexpr operator int() const { return I; }
};

template <class F, int... I>
SKD_HD SKD_INLINE void for_each_index(F f, std::integer_sequence<int, I...>) {
  (f(Index<I>()), ...);
}
template <int kCount, class F>
SKD_HD SKD_INLINE void for_each_index(F f) {
  for_each_index(f, std::make_integer_sequence<int, kCount>());
}

// Unrolled where the indices must be constants: in registers. On a CPU the work of long transforms is left in loops,
// for the sake of code size.
template <int kCount, bool kUnrolled, class F>
SKD_HD SKD_INLINE void for_each_sub(F f) {
  if constexpr (kUnrolled) {
    for_each_index<kCount>(f);
  } else {
    for (int i = 0; i < kCount; ++i) f(i);
  }
}

#if defined(__CUDA_ARCH__)
template <int N>
constexpr bool kUnrolledLength = true;
#else
template <int N>
constexpr bool kUnrolledLength = N <= 16;
#endif

// --- How a length is split ---

SKD_HD constexpr int smallest_factor(int n) {
  for (int p = 2; p * p <= n; ++p) {
    if (n % p == 0) return p;
  }
  return n;
}

SKD_HD constexpr int power_of_factor(int n, int p) {
  int power = 1;
  for (; n % p == 0; n /= p) power *= p;
  return power;
}

SKD_HD constexpr int inverse_modulo(int a, int n) {
  for (int i = 1; i < n; ++i) {
    if (a * i % n == 1) return i;
  }
  return 0;
}

SKD_HD constexpr int radix_of(int n, bool real) {
  const int p = smallest_factor(n), power = power_of_factor(n, p);
  if (power < n) return power;
  if (p != 2) return p;
  return n <= 4 ? 2 : real || n < 64 ? 4 : 8;
}

// N = kRadix * kSub: kRadix transforms of length kSub (sub-transform r, its bin k), then kSub butterflies of kRadix
// numbers each. Coprime factors need no twiddles (Good and Thomas); others do (Cooley and Tukey, decimation in time).
template <int N, bool kReal>
struct Split {
  static constexpr int kRadix = radix_of(N, kReal), kSub = N / kRadix;
  static constexpr bool kCoprime = power_of_factor(N, smallest_factor(N)) < N;
  static constexpr int kRadixUnit = kSub * inverse_modulo(kSub % kRadix, kRadix);
  static constexpr int kSubUnit = kRadix * inverse_modulo(kRadix % kSub, kSub);

  // Where input m of sub-transform r is.
  SKD_HD static SKD_INLINE constexpr int input(int r, int m) {
    if (!kCoprime) return r + kRadix * m;
    const int i = kSub * r + kRadix * m;
    return i >= N ? i - N : i;
  }
  // Where output q of butterfly k belongs.
  SKD_HD static SKD_INLINE constexpr int output(int k, int q) {
    if (!kCoprime) return k + kSub * q;
    const int i = kRadixUnit * q % N + kSubUnit * k % N;
    return i >= N ? i - N : i;
  }
};

// Twiddles of a Cooley-Tukey split for butterflies in a loop.
template <int N, int kRadix, class A>
struct TwiddleTable {
  Complex<A> value[N];
  SKD_HD constexpr TwiddleTable() : value() {
    for (int k = 0; k < N / kRadix; ++k) {
      for (int r = 0; r < kRadix; ++r) {
        const Root root = root_of_unity(r * k, N);
        value[k * kRadix + r].re = A(root.re);
        value[k * kRadix + r].im = A(root.im);
      }
    }
  }
};
#if !defined(__CUDA_ARCH__)
template <int N, int kRadix, class A>
constexpr TwiddleTable<N, kRadix, A> kTwiddles{};
#endif

// input times exp(-2 pi i r k / N)
template <int N, int kRadix, int r, int k, class V>
SKD_HD SKD_INLINE Complex<V> twiddled_input(Complex<V> a, Index<r>, Index<k>) {
  return twiddled<r * k, N>(a);
}
#if !defined(__CUDA_ARCH__)
template <int N, int kRadix, int r, class V>
SKD_INLINE Complex<V> twiddled_input(Complex<V> a, Index<r>, int k) {
  const Complex<Element<V>> w = kTwiddles<N, kRadix, Element<V>>.value[k * kRadix + r];
  return r == 0 ? a : multiply(a, w.re, w.im);
}
#endif

// --- Complex transforms ---

template <int N>
struct ForwardCodelet;

template <class Load>
using LoadedComplex = std::decay_t<decltype(std::declval<Load&>()(Index<0>()))>;

template <>
struct ForwardCodelet<1> {
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void run(Load load, Store store) {
    store(Index<0>(), load(Index<0>()));
  }
};

template <>
struct ForwardCodelet<2> {
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void run(Load load, Store store) {
    const auto a = load(Index<0>()), b = load(Index<1>());
    store(Index<0>(), a + b);
    store(Index<1>(), a - b);
  }
};

template <>
struct ForwardCodelet<4> {
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void run(Load load, Store store) {
    const auto a = load(Index<0>()), b = load(Index<1>()), c = load(Index<2>()), d = load(Index<3>());
    const auto e = a + c, f = a - c, g = b + d, h = turned(b - d);
    store(Index<0>(), e + g);
    store(Index<1>(), f + h);
    store(Index<2>(), e - g);
    store(Index<3>(), f - h);
  }
};

template <>
struct ForwardCodelet<8> {
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void run(Load load, Store store) {
    LoadedComplex<Load> even[4], odd[4];
    ForwardCodelet<4>::run([&](auto j) SKD_INLINED { return load(Index<2 * j>()); },
                           [&](auto k, auto x) SKD_INLINED { even[k] = x; });
    ForwardCodelet<4>::run([&](auto j) SKD_INLINED { return load(Index<2 * j + 1>()); },
                           [&](auto k, auto x) SKD_INLINED { odd[k] = x; });
    for_each_index<4>([&](auto k) SKD_INLINED {
      const auto t = twiddled<k, 8>(odd[k]);
      store(Index<k>(), even[k] + t);
      store(Index<k + 4>(), even[k] - t);
    });
  }
};

// An odd prime, folded: sums x[j] + x[P-j] meet cosines only, differences sines only.
template <int P>
struct PrimeCodelet {
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void run(Load load, Store store) {
    using C = LoadedComplex<Load>;
    using A = Element<decltype(C::re)>;
    constexpr int half = P / 2;
    C sum[half], difference[half];
    const C first = load(Index<0>());
    C total = first;
    for_each_index<half>([&](auto i) SKD_INLINED {
      const C a = load(Index<i + 1>()), b = load(Index<P - 1 - i>());
      sum[i] = a + b;
      difference[i] = a - b;
      total = total + sum[i];
    });
    store(Index<0>(), total);
    for_each_index<half>([&](auto q) SKD_INLINED {
      C even = first, odd{};
      for_each_index<half>([&](auto i) SKD_INLINED {
        using W = UnitRoot<(q + 1) * (i + 1) % P, P>;
        even = {even.re + sum[i].re * A(W::re), even.im + sum[i].im * A(W::re)};
        if constexpr (i == 0) {
          odd = {difference[i].im * A(-W::im), difference[i].re * A(W::im)};
        } else {
          odd = {odd.re + difference[i].im * A(-W::im), odd.im + difference[i].re * A(W::im)};
        }
      });
      store(Index<q + 1>(), even + odd);
      store(Index<P - 1 - q>(), even - odd);
    });
  }
};

template <int N>
struct CompositeCodelet {
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void run(Load load, Store store) {
    using S = Split<N, false>;
    LoadedComplex<Load> bins[N];
    for_each_sub<S::kRadix, kUnrolledLength<N>>([&](auto r) SKD_INLINED {
      ForwardCodelet<S::kSub>::run([&](auto m) SKD_INLINED { return load(S::input(r, m)); },
                                   [&](auto k, auto x) SKD_INLINED { bins[r * S::kSub + k] = x; });
    });
    for_each_sub<S::kSub, kUnrolledLength<N>>([&](auto k) SKD_INLINED {
      ForwardCodelet<S::kRadix>::run(
          [&](auto r) SKD_INLINED {
            const auto x = bins[r * S::kSub + k];
            if constexpr (S::kCoprime) {
              return x;
            } else {
              return twiddled_input<N, S::kRadix>(x, r, k);
            }
          },
          [&](auto q, auto x) SKD_INLINED { store(S::output(k, q), x); });
    });
  }
};

template <int N>
struct ForwardCodelet : std::conditional_t<smallest_factor(N) == N, PrimeCodelet<N>, CompositeCodelet<N>> {
  static_assert(N > 0 && (smallest_factor(N) < N || N <= 13), "no prime factors above 13");
};

// --- Real transforms ---

// A bin of a full spectrum, kept as one of the lower half: of bins k and N - k, which are conjugate, either will do.
template <int N, class V, class Store>
SKD_HD SKD_INLINE void store_half(int k, Complex<V> x, Store store) {
  if (2 * k <= N) {
    store(k, x);
  } else {
    store(N - k, conjugate(x));
  }
}
template <int N, class Load>
SKD_HD SKD_INLINE auto load_half(int k, Load load) {
  return 2 * k <= N ? load(k) : conjugate(load(N - k));
}

template <int N>
struct RealCodelet;

template <>
struct RealCodelet<1> {
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void forward(Load load, Store store) {
    const auto x = load(Index<0>());
    store(Index<0>(), Complex<std::decay_t<decltype(x)>>{x, x - x});
  }
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void adjoint(Load load, Store store) {
    store(Index<0>(), load(Index<0>()).re);
  }
};

template <>
struct RealCodelet<2> {
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void forward(Load load, Store store) {
    const auto a = load(Index<0>()), b = load(Index<1>());
    using V = std::decay_t<decltype(a)>;
    store(Index<0>(), Complex<V>{a + b, V{}});
    store(Index<1>(), Complex<V>{a - b, V{}});
  }
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void adjoint(Load load, Store store) {
    const auto a = load(Index<0>()).re, b = load(Index<1>()).re;
    store(Index<0>(), a + b);
    store(Index<1>(), a - b);
  }
};

template <>
struct RealCodelet<4> {
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void forward(Load load, Store store) {
    const auto a = load(Index<0>()), b = load(Index<1>()), c = load(Index<2>()), d = load(Index<3>());
    using V = std::decay_t<decltype(a)>;
    const V e = a + c, f = b + d;
    store(Index<0>(), Complex<V>{e + f, V{}});
    store(Index<1>(), Complex<V>{a - c, d - b});
    store(Index<2>(), Complex<V>{e - f, V{}});
  }
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void adjoint(Load load, Store store) {
    const auto a = load(Index<0>()).re, c = load(Index<2>()).re;
    const auto b = load(Index<1>());
    const auto e = a + c, f = a - c;
    store(Index<0>(), e + b.re);
    store(Index<1>(), f - b.im);
    store(Index<2>(), e - b.re);
    store(Index<3>(), f + b.im);
  }
};

template <int P>
struct RealPrimeCodelet {
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void forward(Load load, Store store) {
    using V = std::decay_t<decltype(load(Index<0>()))>;
    using A = Element<V>;
    constexpr int half = P / 2;
    V sum[half], difference[half];
    const V first = load(Index<0>());
    V total = first;
    for_each_index<half>([&](auto i) SKD_INLINED {
      const V a = load(Index<i + 1>()), b = load(Index<P - 1 - i>());
      sum[i] = a + b;
      difference[i] = a - b;
      total += sum[i];
    });
    store(Index<0>(), Complex<V>{total, V{}});
    for_each_index<half>([&](auto q) SKD_INLINED {
      V re = first, im{};
      for_each_index<half>([&](auto i) SKD_INLINED {
        using W = UnitRoot<(q + 1) * (i + 1) % P, P>;
        re += sum[i] * A(W::re);
        im = i == 0 ? difference[i] * A(W::im) : im + difference[i] * A(W::im);
      });
      store(Index<q + 1>(), Complex<V>{re, im});
    });
  }
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void adjoint(Load load, Store store) {
    using V = std::decay_t<decltype(load(Index<0>()).re)>;
    using A = Element<V>;
    constexpr int half = P / 2;
    Complex<V> g[half];
    const V first = load(Index<0>()).re;
    V total = first;
    for_each_index<half>([&](auto i) SKD_INLINED {
      g[i] = load(Index<i + 1>());
      total += g[i].re;
    });
    store(Index<0>(), total);
    for_each_index<half>([&](auto j) SKD_INLINED {
      V even = first, odd{};
      for_each_index<half>([&](auto i) SKD_INLINED {
        using W = UnitRoot<(j + 1) * (i + 1) % P, P>;
        even += g[i].re * A(W::re);
        odd = i == 0 ? g[i].im * A(W::im) : odd + g[i].im * A(W::im);
      });
      store(Index<j + 1>(), even + odd);
      store(Index<P - 1 - j>(), even - odd);
    });
  }
};

// Rows are real, so of their bins the lower half is enough; butterfly k yields those of kSub - k as well, conjugate.
template <int N>
struct RealCompositeCodelet {
  using S = Split<N, true>;
  static constexpr int kRadix = S::kRadix, kSub = S::kSub, kBins = kSub / 2 + 1;

  template <class Load, class Store>
  SKD_HD static SKD_INLINE void forward(Load load, Store store) {
    using V = std::decay_t<decltype(load(Index<0>()))>;
    Complex<V> bins[kRadix * kBins];
    for_each_sub<kRadix, kUnrolledLength<N>>([&](auto r) SKD_INLINED {
      RealCodelet<kSub>::forward([&](auto m) SKD_INLINED { return load(S::input(r, m)); },
                                 [&](auto k, auto x) SKD_INLINED { bins[r * kBins + k] = x; });
    });
    for_each_index<kBins>([&](auto k) SKD_INLINED {
      constexpr bool middle = kSub % 2 == 0 && 2 * k == kSub;
      if constexpr (k == 0 || (middle && S::kCoprime)) {
        RealCodelet<kRadix>::forward([&](auto r) SKD_INLINED { return bins[r * kBins + k].re; },
                                     [&](auto q, auto x) SKD_INLINED { store_half<N>(S::output(k, q), x, store); });
      } else if constexpr (middle && kRadix == 2) {
        store(k, Complex<V>{bins[k].re, -bins[kBins + k].re});
      } else if constexpr (middle) {
        static_assert(!middle || kRadix == 4, "the split of a power of two");
        using A = Element<V>;
        const V a = bins[k].re, b = bins[kBins + k].re, c = bins[2 * kBins + k].re, d = bins[3 * kBins + k].re;
        const V e = (b - d) * A(UnitRoot<1, 8>::re), f = (b + d) * A(UnitRoot<1, 8>::re);
        store(k, Complex<V>{a + e, -c - f});
        store(k + kSub, Complex<V>{a - e, c - f});
      } else {
        ForwardCodelet<kRadix>::run(
            [&](auto r) SKD_INLINED { return twiddled<S::kCoprime ? 0 : r * k, N>(bins[r * kBins + k]); },
            [&](auto q, auto x) SKD_INLINED { store_half<N>(S::output(k, q), x, store); });
      }
    });
  }

  // Every step of forward transposed, in the opposite order.
  template <class Load, class Store>
  SKD_HD static SKD_INLINE void adjoint(Load load, Store store) {
    using V = std::decay_t<decltype(load(Index<0>()).re)>;
    Complex<V> bins[kRadix * kBins];
    for_each_index<kBins>([&](auto k) SKD_INLINED {
      constexpr bool middle = kSub % 2 == 0 && 2 * k == kSub;
      if constexpr (k == 0 || (middle && S::kCoprime)) {
        RealCodelet<kRadix>::adjoint([&](auto q) SKD_INLINED { return load_half<N>(S::output(k, q), load); },
                                     [&](auto r, auto x) SKD_INLINED { bins[r * kBins + k] = Complex<V>{x, V{}}; });
      } else if constexpr (middle && kRadix == 2) {
        const Complex<V> g = load(k);
        bins[k] = Complex<V>{g.re, V{}};
        bins[kBins + k] = Complex<V>{-g.im, V{}};
      } else if constexpr (middle) {
        using A = Element<V>;
        const Complex<V> g = load(k), h = load(k + kSub);
        const V e = (g.re - h.re) * A(UnitRoot<1, 8>::re), f = (g.im + h.im) * A(UnitRoot<1, 8>::re);
        bins[k] = Complex<V>{g.re + h.re, V{}};
        bins[kBins + k] = Complex<V>{e - f, V{}};
        bins[2 * kBins + k] = Complex<V>{h.im - g.im, V{}};
        bins[3 * kBins + k] = Complex<V>{-e - f, V{}};
      } else {
        // Backward is forward with real and imaginary parts exchanged on both sides, twiddles included.
        ForwardCodelet<kRadix>::run([&](auto q) SKD_INLINED { return exchanged(load_half<N>(S::output(k, q), load)); },
                                    [&](auto r, auto x) SKD_INLINED {
                                      bins[r * kBins + k] = exchanged(twiddled<S::kCoprime ? 0 : r * k, N>(x));
                                    });
      }
    });
    for_each_sub<kRadix, kUnrolledLength<N>>([&](auto r) SKD_INLINED {
      RealCodelet<kSub>::adjoint([&](auto k) SKD_INLINED { return bins[r * kBins + k]; },
                                 [&](auto m, auto x) SKD_INLINED { store(S::input(r, m), x); });
    });
  }
};

template <int N>
struct RealCodelet : std::conditional_t<smallest_factor(N) == N, RealPrimeCodelet<N>, RealCompositeCodelet<N>> {
  static_assert(N > 0 && (smallest_factor(N) < N || N <= 13), "no prime factors above 13");
};

// --- Interface ---

template <int N, class Load, class Store>
SKD_HD SKD_INLINE void fft_forward(Load load, Store store) {
  ForwardCodelet<N>::run(load, store);
}

template <int N, class Load, class Store>
SKD_HD SKD_INLINE void fft_backward(Load load, Store store) {
  ForwardCodelet<N>::run([&](auto k) SKD_INLINED { return exchanged(load(k)); },
                         [&](auto j, auto x) SKD_INLINED { store(j, exchanged(x)); });
}

template <int N, class Load, class Store, std::enable_if_t<!std::is_pointer<Load>::value, int> = 0>
SKD_HD SKD_INLINE void fft_real_forward(Load load, Store store) {
  RealCodelet<N>::forward(load, store);
}

template <int N, class Load, class Store, std::enable_if_t<!std::is_pointer<Load>::value, int> = 0>
SKD_HD SKD_INLINE void fft_half_adjoint(Load load, Store store) {
  RealCodelet<N>::adjoint(load, store);
}

template <int N, class V>
SKD_HD SKD_INLINE void fft_forward(Complex<V>* x) {
  fft_forward<N>([=](int j) SKD_INLINED { return x[j]; }, [=](int k, Complex<V> y) SKD_INLINED { x[k] = y; });
}

template <int N, class V>
SKD_HD SKD_INLINE void fft_backward(Complex<V>* x) {
  fft_backward<N>([=](int k) SKD_INLINED { return x[k]; }, [=](int j, Complex<V> y) SKD_INLINED { x[j] = y; });
}

template <int N, class V>
SKD_HD SKD_INLINE void fft_real_forward(const V* x, Complex<V>* bins) {
  fft_real_forward<N>([=](int j) SKD_INLINED { return x[j]; }, [=](int k, Complex<V> y) SKD_INLINED { bins[k] = y; });
}

template <int N, class V>
SKD_HD SKD_INLINE void fft_half_adjoint(const Complex<V>* bins, V* x) {
  fft_half_adjoint<N>([=](int k) SKD_INLINED { return bins[k]; }, [=](int j, V y) SKD_INLINED { x[j] = y; });
}

}  // namespace
}  // namespace skd
