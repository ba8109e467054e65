// Fourier transforms of lengths known at run time (common/fft_lengths.h) by the threads of a block, between two buffers
// in shared or global memory.
#pragma once

#include "common/fft_lengths.h"
#include "cuda/fourier_bins.h"

namespace skd {
namespace {

// --- Plans and twiddles ---

// exp(-2 pi i k / n), to the last bit or the one before: the angle is a number below pi/4 in double, series of floats
// take it from there. Double precision throughout would be slow where there are few units for it.
__device__ inline Complex<float> root_in_float(int64_t k, int64_t n) {
  k %= n;
  const int octant = int(8 * k / n);
  const int64_t part = octant % 2 == 0 ? 8 * k - octant * n : (octant + 1) * n - 8 * k;
  const double angle = 0.78539816339744830962 * double(part) / double(n);
  const float x = float(angle), rest = float(angle - double(x)), x2 = x * x;
  float sine = -1.0f / 39916800;
  sine = sine * x2 + 1.0f / 362880;
  sine = sine * x2 - 1.0f / 5040;
  sine = sine * x2 + 1.0f / 120;
  sine = sine * x2 - 1.0f / 6;
  sine = x + x * x2 * sine;
  float cosine = -1.0f / 3628800;
  cosine = cosine * x2 + 1.0f / 40320;
  cosine = cosine * x2 - 1.0f / 720;
  cosine = cosine * x2 + 1.0f / 24;
  cosine = 1 + (x2 * x2 * cosine - 0.5f * x2);
  const float s = sine + rest * cosine, c = cosine - rest * sine;
  switch (octant) {
    case 0: return {c, -s};
    case 1: return {s, -c};
    case 2: return {-s, -c};
    case 3: return {-c, -s};
    case 4: return {-c, s};
    case 5: return {-s, c};
    case 6: return {s, c};
    default: return {c, s};
  }
}

// Fills the table of a plan as FftTables does on the host; all threads of the block take part.
__device__ inline void fill_twiddles(const FftPlan<float>& plan, Complex<float>* table) {
  for (int p = 0; p < plan.passes; ++p) {
    const FftPass pass = plan.pass[p];
    Complex<float>* const to = table + pass.twiddles;
    if (!fft_radix_is_fixed(pass.radix)) {
      const int roots = pass.span * pass.radix;
      for (int i = threadIdx.x; i < roots; i += kThreads) to[i] = root_in_float(i, roots);
    } else if (pass.span > 1) {
      const int most = pass.radix - 1;
      for (int i = threadIdx.x; i < pass.span * most; i += kThreads) {
        to[i] = root_in_float(int64_t(i / most) * (i % most + 1), int64_t(pass.span) * pass.radix);
      }
    }
  }
  if (!plan.packed) return;
  for (int k = threadIdx.x; 2 * k <= plan.points; k += kThreads) {
    const Complex<float> root = root_in_float(k, plan.length);
    table[plan.post_twiddles + k] = {root.im * 0.5f, root.re * -0.5f};
  }
}

// Copies a plan to shared memory, where its passes can be indexed, with its table's address.
__device__ inline void set_plan(FftPlan<float>* shared, const FftPlan<float>& plan, const Complex<float>* table) {
  if (threadIdx.x != 0) return;
  *shared = plan;
  shared->table = table;
}

// --- Passes ---

// Transform t of `count` begins at bin t / inner * outer_pitch + t % inner * inner_pitch, its numbers are `step` apart.
template <class I>
struct Transforms {
  I count, inner, outer_pitch, inner_pitch, step;
  __device__ I start(I t) const { return t / inner * outer_pitch + t % inner * inner_pitch; }
};

// fft_butterfly for first passes and later ones in one piece of code: half as much to compile.
template <int R, class Load, class Store>
__device__ inline void butterfly(const FftPlan<float>& plan, const FftPass& pass, int b, Load load, Store store) {
  const int span = pass.span, k = b % span, to = (b - k) * R + k;
  const Complex<float>* const twiddles = plan.table + pass.twiddles + k * (R - 1);
  fft_forward<R>(
      [&](int r) SKD_INLINED {
        Complex<float> x = load(b + r * pass.butterflies);
        if (r > 0 && span > 1) x = multiply(x, twiddles[r - 1].re, twiddles[r - 1].im);
        return x;
      },
      [&](int q, Complex<float> x) SKD_INLINED { store(to + q * span, x); });
}

template <int R, class I, class Load>
__device__ inline void run_pass_of(const FftPlan<float>& plan, int p, const Transforms<I>& those, Load load, Bin* to) {
  const FftPass pass = plan.pass[p];
  const I butterflies = pass.butterflies, all = those.count * butterflies;
  for (I item = threadIdx.x; item < all; item += kThreads) {
    // Threads that follow each other read numbers that do.
    const I t = those.step == 1 ? item / butterflies : item % those.count;
    const int b = int(those.step == 1 ? item % butterflies : item / those.count);
    Bin* const out = to + those.start(t);
    butterfly<R>(
        plan, pass, b, [&](int i) SKD_INLINED { return load(t, i); },
        [&](int i, Complex<float> x) SKD_INLINED { store_bin(out + i * those.step, x); });
  }
}

template <class I, class Load>
__device__ inline void run_pass(const FftPlan<float>& plan, int p, const Transforms<I>& those, Load load, Bin* to) {
  switch (plan.pass[p].radix) {
    case 2: return run_pass_of<2>(plan, p, those, load, to);
    case 3: return run_pass_of<3>(plan, p, those, load, to);
    case 4: return run_pass_of<4>(plan, p, those, load, to);
    case 5: return run_pass_of<5>(plan, p, those, load, to);
    case 6: return run_pass_of<6>(plan, p, those, load, to);
    case 7: return run_pass_of<7>(plan, p, those, load, to);
    case 8: return run_pass_of<8>(plan, p, those, load, to);
    case 9: return run_pass_of<9>(plan, p, those, load, to);
    case 10: return run_pass_of<10>(plan, p, those, load, to);
    case 12: return run_pass_of<12>(plan, p, those, load, to);
    case 16: return run_pass_of<16>(plan, p, those, load, to);
  }
  const I points = plan.points, all = those.count * points;
  for (I item = threadIdx.x; item < all; item += kThreads) {
    const I t = those.step == 1 ? item / points : item % those.count;
    const int i = int(those.step == 1 ? item % points : item / those.count);
    fft_prime_output(
        plan, p, i, [&](int j) SKD_INLINED { return load(t, j); },
        [&](int j, Complex<float> x) SKD_INLINED { store_bin(to + those.start(t) + j * those.step, x); });
  }
}

// Passes from buffer to buffer, each with a barrier after it; returns the one with the result. The first reads
// load(transform, number), which may be from the second buffer, and writes to the first.
template <class I, class Load>
__device__ inline Bin* run_passes(const FftPlan<float>& plan, const Transforms<I>& those, Load load, Bin* first,
                                  Bin* second) {
  Bin *from = second, *to = first;
#pragma unroll 1
  for (int p = 0; p < plan.passes; ++p) {
    run_pass(
        plan, p, those,
        [&](I t, int i) SKD_INLINED { return p == 0 ? load(t, i) : load_bin(from + those.start(t) + i * those.step); },
        to);
    __syncthreads();
    Bin* const result = to;
    to = from;
    from = result;
  }
  return from;
}

}  // namespace
}  // namespace skd
