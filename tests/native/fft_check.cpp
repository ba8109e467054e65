// csrc/common/fft_*.h behind a C interface, for tests/test_fft.py, which names a type of numbers, the lanes of a vector
// (1: no vector) and the lengths of codelets. Numbers are ordered [index][part][lane]; real ones have no parts.

#include <vector>

#include "common/fft_codelets.h"
#include "common/fft_lengths.h"

namespace {

using skd::Complex;

enum Transform : int { forward, backward, real_forward, half_adjoint };
enum Way : int { codelet, codelet_array, plan, plan_array, plan_by_butterflies };

template <class V>
struct Data {
  const V* in;
  V* out;
  Complex<V> load(int i) const { return {in[2 * i], in[2 * i + 1]}; }
  void store(int i, Complex<V> x) const {
    out[2 * i] = x.re;
    out[2 * i + 1] = x.im;
  }
};

template <int N, class V>
void run_codelet(int transform, const V* in, V* out) {
  const Data<V> data{in, out};
  const auto load = [&](int i) { return data.load(i); };
  const auto store = [&](int i, Complex<V> x) { data.store(i, x); };
  if (transform == forward) skd::fft_forward<N>(load, store);
  if (transform == backward) skd::fft_backward<N>(load, store);
  if (transform == real_forward) skd::fft_real_forward<N>([&](int i) { return in[i]; }, store);
  if (transform == half_adjoint) skd::fft_half_adjoint<N>(load, [&](int i, V x) { out[i] = x; });
}

template <int N, class V>
void run_codelet_on_array(int transform, const V* in, V* out) {
  const Data<V> data{in, out};
  Complex<V> x[N];
  V real[N];
  const int bins = N / 2 + 1;
  for (int i = 0; i < (transform == half_adjoint ? bins : N); ++i) {
    if (transform == real_forward) {
      real[i] = in[i];
    } else {
      x[i] = data.load(i);
    }
  }
  if (transform == forward) skd::fft_forward<N>(x);
  if (transform == backward) skd::fft_backward<N>(x);
  if (transform == real_forward) skd::fft_real_forward<N>(real, x);
  if (transform == half_adjoint) skd::fft_half_adjoint<N>(x, real);
  for (int i = 0; i < (transform == real_forward ? bins : N); ++i) {
    if (transform == half_adjoint) {
      out[i] = real[i];
    } else {
      data.store(i, x[i]);
    }
  }
}

template <class V>
bool run_codelet(int n, int transform, bool array, const V* in, V* out) {
  if (array && n != 15) return false;  // one length is enough
  if (array) {
    run_codelet_on_array<15>(transform, in, out);
    return true;
  }
  switch (n) {
#define LENGTH(N) \
  case N: run_codelet<N>(transform, in, out); return true;
    SKD_LENGTHS(LENGTH)
#undef LENGTH
    default: return false;
  }
}

// As the threads of a block do it: every pass from one array to the other, its butterflies one by one and backwards.
template <class A, class V>
Complex<V>* run_by_butterflies(const skd::FftPlan<A>& plan, Complex<V>* from, Complex<V>* to) {
  for (int p = 0; p < plan.passes; ++p) {
    const int radix = plan.pass[p].radix, count = plan.pass[p].butterflies;
    const auto load = [&](int i) { return from[i]; };
    const auto store = [&](int i, Complex<V> x) { to[i] = x; };
    if (!skd::fft_radix_is_fixed(radix)) {
      for (int i = plan.points - 1; i >= 0; --i) skd::fft_prime_output(plan, p, i, load, store);
    }
    for (int b = count - 1; b >= 0; --b) {
      switch (radix) {
#define RADIX(R) \
  case R: skd::fft_butterfly<R>(plan, p, b, load, store); break;
        RADIX(1) RADIX(2) RADIX(3) RADIX(4) RADIX(5) RADIX(6) RADIX(7) RADIX(8) RADIX(9) RADIX(10) RADIX(12) RADIX(16)
#undef RADIX
      }
    }
    std::swap(from, to);
  }
  return from;
}

template <class V, class A>
void run_plan(const skd::FftPlan<A>& plan, int transform, int way, const V* in, V* out) {
  const Data<V> data{in, out};
  const auto load = [&](int i) { return data.load(i); };
  const auto store = [&](int i, Complex<V> x) { data.store(i, x); };
  const auto load_real = [&](int i) { return in[i]; };
  const auto store_real = [&](int i, V x) { out[i] = x; };
  std::vector<Complex<V>> work(plan.work + 1), x(plan.points + 1);
  V poison = V{} + A(1e30);
  for (auto& number : work) number = {poison, poison};
  if (transform == forward || transform == backward) {
    if (way == Way::plan) {
      if (transform == forward) skd::fft_forward(plan, load, store, work.data());
      if (transform == backward) skd::fft_backward(plan, load, store, work.data());
      return;
    }
    for (int i = 0; i < plan.points; ++i) x[i] = load(i);
    if (way == plan_by_butterflies) {
      if (transform == backward) return;
      const Complex<V>* const result = run_by_butterflies(plan, x.data(), work.data());
      for (int i = 0; i < plan.points; ++i) store(i, result[i]);
      return;
    }
    if (transform == forward) skd::fft_forward(plan, x.data(), work.data());
    if (transform == backward) skd::fft_backward(plan, x.data(), work.data());
    for (int i = 0; i < plan.points; ++i) store(i, x[i]);
  }
  if (transform == real_forward) skd::fft_real_forward(plan, load_real, store, work.data());
  if (transform == half_adjoint) skd::fft_half_adjoint(plan, load, store_real, work.data());
}

template <class V>
bool run(int n, int transform, int way, const void* in, void* out) {
  using A = skd::Element<V>;
  // Vectors may want more alignment than the caller's memory has.
  const bool real_in = transform == real_forward, real_out = transform == half_adjoint;
  const int count_in = real_in ? n : transform == half_adjoint ? n / 2 * 2 + 2 : 2 * n;
  const int count_out = real_out ? n : transform == real_forward ? n / 2 * 2 + 2 : 2 * n;
  std::vector<V> from(count_in), to(count_out);
  __builtin_memcpy(from.data(), in, count_in * sizeof(V));
  __builtin_memcpy(to.data(), out, count_out * sizeof(V));  // poisoned
  if (way == codelet || way == codelet_array) {
    if (!run_codelet(n, transform, way == codelet_array, from.data(), to.data())) return false;
  } else {
    const bool real = transform == real_forward || transform == half_adjoint;
    const skd::FftTables<A> tables(n, real ? skd::FftKind::real : skd::FftKind::complex);
    run_plan<V, A>(tables.plan(), transform, way, from.data(), to.data());
  }
  __builtin_memcpy(out, to.data(), count_out * sizeof(V));
  return true;
}

#if SKD_LANES == 1
typedef SKD_NUMBER Lanes;
#else
typedef SKD_NUMBER Lanes __attribute__((vector_size(SKD_LANES * sizeof(SKD_NUMBER))));
#endif

}  // namespace

extern "C" __attribute__((visibility("default"))) int skd_fft(int n, int transform, int way, const void* in,
                                                              void* out) {
  return run<Lanes>(n, transform, way, in, out);
}
