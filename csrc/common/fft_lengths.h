// Fourier transforms of any length that is known at run time only, for numbers (CUDA) and SIMD vectors (CPU).
//
// Once per length, on the host (A is the numbers' type, float or double):
//   const FftTables<A> tables(n, FftKind::complex or FftKind::real);     owns the twiddles
//   const FftPlan<A> plan = tables.plan();                               plain data; to run it on a GPU, copy
//                                                                        tables.data() there and set plan.table
// On a CPU, with work[plan.work] of Complex<V> (which nothing else overlaps):
//   fft_forward(plan, load, store, work)          load(j) -> Complex<V>, store(k, X[k])
//   fft_backward(plan, load, store, work)         as fft_forward with exp(+...), not normalised
//   fft_real_forward(plan, load, store, work)     load(j) -> V, store(k, X[k]) for k = 0..n/2
//   fft_half_adjoint(plan, load, store, work)     load(k) -> Complex<V> for k = 0..n/2, store(j, V): the transpose, as
//                                                 in fft_codelets.h
// and in place on an array, fft_forward(plan, x, scratch) and fft_backward(plan, x, scratch) with scratch[n]. The last
// two transforms need a plan of FftKind::real, the others one of FftKind::complex. Order is natural on both sides.
// Every index is loaded at least once and stored exactly once, everything loaded before anything is stored.
//
// On a GPU the threads of a block share each pass, with a barrier after it, from one array to another (a last pass with
// fft_radix_is_fixed may stay in its array; its butterflies are independent):
//   for (int p = 0; p < plan.passes; ++p)
//     switch (plan.pass[p].radix)
//       case R: butterflies b = 0 .. plan.pass[p].butterflies - 1:  fft_butterfly<R>(plan, p, b, load, store)
//       default (fft_radix_is_fixed(radix) is false): outputs i = 0 .. n - 1:  fft_prime_output(plan, p, i, load,
//       store)
// For real transforms, fft_bins_of_halves(plan, k, load, store) for k = 0 .. (n/2)/2 comes after the passes over n/2
// numbers x[2j] + i x[2j+1], and fft_halves_of_bins before them in the adjoint.
#pragma once

#include <cstddef>
#include <vector>

#include "common/fft_codelets.h"

namespace skd {

enum class FftKind : int { complex, real };

// One pass of Stockham's algorithm: `span` is the length of the transforms that are complete before it.
struct FftPass {
  int radix, span, butterflies, twiddles;  // twiddles: where they begin in the table
};

constexpr int kMaxFftPasses = 16;  // 16 of radix 4 make 2^32, and rarer factors are larger

template <class A>
struct FftPlan {
  int length, points;  // points: of the complex transform, half the length if that is even and the kind is real
  int passes, post_twiddles, work;
  bool packed;  // pairs of real numbers are transformed as complex ones
  FftPass pass[kMaxFftPasses];
  const Complex<A>* table;
};

namespace {

// Radices with a codelet; any other is a prime, done by its definition.
SKD_HD constexpr bool fft_radix_is_fixed(int radix) { return radix <= 10 || radix == 12 || radix == 16; }

// --- One butterfly ---

// Butterfly b of a pass: reads numbers b + r * butterflies, writes radix numbers `span` apart. k is b % span.
template <int R, bool kFirst, class A, class Load, class Store>
SKD_HD SKD_INLINE void fft_butterfly(const FftPlan<A>& plan, const FftPass& pass, int b, int k, Load load,
                                     Store store) {
  const Complex<A>* const twiddle = plan.table + pass.twiddles + k * (R - 1);
  const int step = pass.butterflies, to = (b - k) * R + k, span = kFirst ? 1 : pass.span;
  fft_forward<R>(
      [&](int r) SKD_INLINED {
        const auto x = load(b + r * step);
        return kFirst || r == 0 ? x : multiply(x, twiddle[r - 1].re, twiddle[r - 1].im);
      },
      [&](int q, auto x) SKD_INLINED { store(to + q * span, x); });
}

template <int R, class A, class Load, class Store>
SKD_HD SKD_INLINE void fft_butterfly(const FftPlan<A>& plan, int p, int b, Load load, Store store) {
  const FftPass& pass = plan.pass[p];
  if (pass.span == 1) {
    fft_butterfly<R, true>(plan, pass, b, 0, load, store);
  } else {
    fft_butterfly<R, false>(plan, pass, b, b % pass.span, load, store);
  }
}

// Output i of a pass with any radix.
template <class A, class Load, class Store>
SKD_HD SKD_INLINE void fft_prime_output(const FftPlan<A>& plan, int p, int i, Load load, Store store) {
  const FftPass& pass = plan.pass[p];
  const int roots = pass.span * pass.radix, bin = i % roots;  // bin = k + span * q
  const int b = i / roots * pass.span + bin % pass.span;
  const Complex<A>* const root = plan.table + pass.twiddles;
  auto sum = load(b);
  for (int r = 1, turn = bin; r < pass.radix; ++r) {
    sum = sum + multiply(load(b + r * pass.butterflies), root[turn].re, root[turn].im);
    turn += bin;
    if (turn >= roots) turn -= roots;
  }
  store(i, sum);
}

// Bins k and points - k of a real signal from those of its even and odd halves, which load(k) has packed as
// even + i odd; for k = 0 .. points / 2.
template <class A, class Load, class Store>
SKD_HD SKD_INLINE void fft_bins_of_halves(const FftPlan<A>& plan, int k, Load load, Store store) {
  using V = std::decay_t<decltype(load(0).re)>;
  const int n = plan.points;
  const Complex<V> a = load(k);
  if (k == 0) {
    store(0, Complex<V>{a.re + a.im, V{}});
    store(n, Complex<V>{a.re - a.im, V{}});
  } else if (2 * k == n) {
    store(k, conjugate(a));
  } else {
    const Complex<V> b = conjugate(load(n - k)), sum = a + b;
    const Complex<A> w = plan.table[plan.post_twiddles + k];
    const Complex<V> turn = multiply(a - b, w.re, w.im);
    store(k, Complex<V>{sum.re * A(0.5) + turn.re, sum.im * A(0.5) + turn.im});
    store(n - k, Complex<V>{sum.re * A(0.5) - turn.re, turn.im - sum.im * A(0.5)});
  }
}

// The transpose of fft_bins_of_halves.
template <class A, class Load, class Store>
SKD_HD SKD_INLINE void fft_halves_of_bins(const FftPlan<A>& plan, int k, Load load, Store store) {
  using V = std::decay_t<decltype(load(0).re)>;
  const int n = plan.points;
  const Complex<V> a = load(k);
  if (k == 0) {
    const V b = load(n).re;
    store(0, Complex<V>{a.re + b, a.re - b});
  } else if (2 * k == n) {
    store(k, conjugate(a));
  } else {
    const Complex<V> b = conjugate(load(n - k)), sum = a + b;
    const Complex<A> w = plan.table[plan.post_twiddles + k];
    const Complex<V> turn = multiply(a - b, w.re, -w.im);
    store(k, Complex<V>{sum.re * A(0.5) + turn.re, sum.im * A(0.5) + turn.im});
    store(n - k, Complex<V>{sum.re * A(0.5) - turn.re, turn.im - sum.im * A(0.5)});
  }
}

// --- Passes, on a CPU ---

template <bool kFirst, int R, class A, class Load, class Store>
inline void run_fft_pass_of(const FftPlan<A>& plan, const FftPass& pass, Load load, Store store) {
  if constexpr (kFirst) {
    for (int b = 0; b < pass.butterflies; ++b) fft_butterfly<R, true>(plan, pass, b, 0, load, store);
  } else {
    for (int first = 0; first < pass.butterflies; first += pass.span) {
      for (int k = 0; k < pass.span; ++k) fft_butterfly<R, false>(plan, pass, first + k, k, load, store);
    }
  }
}

template <bool kFirst, class A, class Load, class Store>
inline void run_fft_pass(const FftPlan<A>& plan, int p, Load load, Store store) {
  const FftPass& pass = plan.pass[p];
  switch (pass.radix) {
    case 2: return run_fft_pass_of<kFirst, 2>(plan, pass, load, store);
    case 3: return run_fft_pass_of<kFirst, 3>(plan, pass, load, store);
    case 4: return run_fft_pass_of<kFirst, 4>(plan, pass, load, store);
    case 5: return run_fft_pass_of<kFirst, 5>(plan, pass, load, store);
    case 6: return run_fft_pass_of<kFirst, 6>(plan, pass, load, store);
    case 7: return run_fft_pass_of<kFirst, 7>(plan, pass, load, store);
    case 8: return run_fft_pass_of<kFirst, 8>(plan, pass, load, store);
    case 9: return run_fft_pass_of<kFirst, 9>(plan, pass, load, store);
    case 10: return run_fft_pass_of<kFirst, 10>(plan, pass, load, store);
    case 12: return run_fft_pass_of<kFirst, 12>(plan, pass, load, store);
    case 16: return run_fft_pass_of<kFirst, 16>(plan, pass, load, store);
    default:
      for (int i = 0; i < plan.points; ++i) fft_prime_output(plan, p, i, load, store);
  }
}

template <class V>
struct FromArray {
  const Complex<V>* array;
  SKD_INLINE Complex<V> operator()(int i) const { return array[i]; }
};

template <class V>
struct ToArray {
  Complex<V>* array;
  SKD_INLINE void operator()(int i, Complex<V> x) const { array[i] = x; }
};

// All passes but the last; returns where its input is, one of the two arrays. `load` may read from `second`.
template <class A, class V, class Load>
inline Complex<V>* run_fft_passes_but_last(const FftPlan<A>& plan, Load load, Complex<V>* first, Complex<V>* second) {
  run_fft_pass<true>(plan, 0, load, ToArray<V>{first});
  Complex<V>*from = first, *to = second;
  for (int p = 1; p + 1 < plan.passes; ++p) {
    run_fft_pass<false>(plan, p, FromArray<V>{from}, ToArray<V>{to});
    std::swap(from, to);
  }
  return from;
}

// A last pass writes where it reads, butterfly by butterfly. One by definition has no butterflies and goes by way of
// the other array, as does an only pass, whose output is complete already.
template <class A>
inline bool last_fft_pass_is_in_place(const FftPlan<A>& plan) {
  return plan.passes > 1 && fft_radix_is_fixed(plan.pass[plan.passes - 1].radix);
}

template <class A, class V, class Load, class Store>
inline void run_fft(const FftPlan<A>& plan, Load load, Store store, Complex<V>* first, Complex<V>* second) {
  Complex<V>* from = run_fft_passes_but_last(plan, load, first, second);
  if (last_fft_pass_is_in_place(plan)) return run_fft_pass<false>(plan, plan.passes - 1, FromArray<V>{from}, store);
  if (plan.passes > 1) {
    Complex<V>* const to = from == first ? second : first;
    run_fft_pass<false>(plan, plan.passes - 1, FromArray<V>{from}, ToArray<V>{to});
    from = to;
  }
  for (int i = 0; i < plan.points; ++i) store(i, from[i]);
}

// The same into one of the two arrays, which it returns.
template <class A, class V, class Load>
inline Complex<V>* run_fft_to_array(const FftPlan<A>& plan, Load load, Complex<V>* first, Complex<V>* second) {
  Complex<V>* const from = run_fft_passes_but_last(plan, load, first, second);
  if (plan.passes == 1) return from;
  Complex<V>* const to = last_fft_pass_is_in_place(plan) ? from : from == first ? second : first;
  run_fft_pass<false>(plan, plan.passes - 1, FromArray<V>{from}, ToArray<V>{to});
  return to;
}

// --- Interface on a CPU ---

template <class A, class V, class Load, class Store>
inline void fft_forward(const FftPlan<A>& plan, Load load, Store store, Complex<V>* work) {
  run_fft(plan, load, store, work, work + plan.points);
}

template <class A, class V, class Load, class Store>
inline void fft_backward(const FftPlan<A>& plan, Load load, Store store, Complex<V>* work) {
  run_fft(
      plan, [&](int k) SKD_INLINED { return exchanged(load(k)); },
      [&](int j, Complex<V> x) SKD_INLINED { store(j, exchanged(x)); }, work, work + plan.points);
}

template <class A, class V>
inline void fft_forward(const FftPlan<A>& plan, Complex<V>* x, Complex<V>* scratch) {
  run_fft(plan, FromArray<V>{x}, ToArray<V>{x}, scratch, x);
}

template <class A, class V>
inline void fft_backward(const FftPlan<A>& plan, Complex<V>* x, Complex<V>* scratch) {
  run_fft(
      plan, [=](int k) SKD_INLINED { return exchanged(x[k]); },
      [=](int j, Complex<V> y) SKD_INLINED { x[j] = exchanged(y); }, scratch, x);
}

template <class A, class V, class Load, class Store>
inline void fft_real_forward(const FftPlan<A>& plan, Load load, Store store, Complex<V>* work) {
  Complex<V>* const other = work + plan.points;
  if (plan.packed) {
    const Complex<V>* const packed = run_fft_to_array(
        plan, [&](int j) SKD_INLINED { return Complex<V>{load(2 * j), load(2 * j + 1)}; }, work, other);
    for (int k = 0; 2 * k <= plan.points; ++k) fft_bins_of_halves(plan, k, FromArray<V>{packed}, store);
  } else {
    const Complex<V>* const bins =
        run_fft_to_array(plan, [&](int j) SKD_INLINED { return Complex<V>{load(j), V{}}; }, work, other);
    for (int k = 0; 2 * k <= plan.points; ++k) store(k, bins[k]);
  }
}

template <class A, class V, class Load, class Store>
inline void fft_half_adjoint(const FftPlan<A>& plan, Load load, Store store, Complex<V>* work) {
  Complex<V>* const other = work + plan.points;
  if (plan.packed) {
    for (int k = 0; 2 * k <= plan.points; ++k) fft_halves_of_bins(plan, k, load, ToArray<V>{other});
    run_fft(
        plan, [=](int k) SKD_INLINED { return exchanged(other[k]); },
        [&](int j, Complex<V> x) SKD_INLINED {
          store(2 * j, x.im);
          store(2 * j + 1, x.re);
        },
        work, other);
  } else {
    const int bins = plan.points / 2 + 1;
    run_fft(
        plan, [&](int k) SKD_INLINED { return k < bins ? exchanged(load(k)) : Complex<V>{}; },
        [&](int j, Complex<V> x) SKD_INLINED { store(j, x.im); }, work, other);
  }
}

// --- Plans ---

// The radices of the passes in order: primes without a codelet first, whose pass cannot stay in its array, then as few
// of the others as there can be.
inline std::vector<int> fft_radices(int points) {
  std::vector<int> radices;
  int large = points;
  for (int p : {2, 3, 5, 7}) {
    while (large % p == 0) large /= p;
  }
  const int rest = points / large;
  for (int p = 11; int64_t(p) * p <= large; p += 2) {
    for (; large % p == 0; large /= p) radices.push_back(p);
  }
  if (large > 1) radices.push_back(large);
  // Among the splits of the rest with the fewest passes the one with the smallest sum, for it has the least work.
  static constexpr int kFixed[] = {16, 12, 10, 9, 8, 7, 6, 5, 4, 3, 2};
  std::vector<int> best, chosen;
  const auto sum = [](const std::vector<int>& v) {
    int total = 0;
    for (int x : v) total += x;
    return total;
  };
  const auto search = [&](const auto& self, int left, int from) -> void {
    if (left == 1) {
      if (best.empty() || chosen.size() < best.size() || (chosen.size() == best.size() && sum(chosen) < sum(best))) {
        best = chosen;
      }
      return;
    }
    if (!best.empty() && chosen.size() >= best.size()) return;
    for (int i = from; i < int(sizeof(kFixed) / sizeof(int)); ++i) {
      if (left % kFixed[i] != 0) continue;
      chosen.push_back(kFixed[i]);
      self(self, left / kFixed[i], i);
      chosen.pop_back();
    }
  };
  if (rest > 1) search(search, rest, 0);
  radices.insert(radices.end(), best.begin(), best.end());
  if (radices.empty()) radices.push_back(1);
  return radices;
}

template <class A>
class FftTables {
 public:
  FftTables(int length, FftKind kind) : plan_() {
    plan_.length = length;
    plan_.packed = kind == FftKind::real && length % 2 == 0;
    plan_.points = plan_.packed ? length / 2 : length;
    int span = 1;
    for (int radix : fft_radices(plan_.points)) {
      plan_.pass[plan_.passes++] = {radix, span, plan_.points / radix, int(table_.size())};
      if (!fft_radix_is_fixed(radix)) {
        for (int i = 0; i < span * radix; ++i) add(root_of_unity(i, span * radix));
      } else if (span > 1) {
        for (int k = 0; k < span; ++k) {
          for (int r = 1; r < radix; ++r) add(root_of_unity(int64_t(k) * r, span * radix));
        }
      }
      span *= radix;
    }
    plan_.post_twiddles = int(table_.size());
    for (int k = 0; plan_.packed && 2 * k <= plan_.points; ++k) {  // -i/2 exp(-2 pi i k / length)
      const Root root = root_of_unity(k, length);
      add({root.im / 2, -root.re / 2});
    }
    plan_.work = 2 * plan_.points;
  }

  FftPlan<A> plan() const {
    FftPlan<A> plan = plan_;
    plan.table = table_.data();
    return plan;
  }
  const Complex<A>* data() const { return table_.data(); }
  size_t size() const { return table_.size(); }

 private:
  void add(Root root) { table_.push_back({A(root.re), A(root.im)}); }
  FftPlan<A> plan_;
  std::vector<Complex<A>> table_;
};

}  // namespace
}  // namespace skd
