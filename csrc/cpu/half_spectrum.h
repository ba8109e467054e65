// rfft2 of a vector of planes, a lane for each, and its adjoint.
//
// A tile holds [positions][lanes]; the half spectrum of a vector of its lanes [H][W//2+1] complex vectors.
#pragma once

#include "common/fft_lengths.h"
#include "cpu/simd.h"

namespace skd {
namespace SKD_ISA {
namespace {

// A vector of lanes of a tile.
template <class A>
struct TileLanes {
  A* data;
  int64_t lanes;
  SKD_INLINE Vector<A> load(int64_t position) const { return Access<A, A>::load(data + position * lanes); }
  SKD_INLINE void store(int64_t position, Vector<A> v) const { Access<A, A>::store(data + position * lanes, v); }
};

// --- Lengths with a codelet ---

template <int N, class A>
void rows_to_bins(const FftPlan<A>&, TileLanes<A> tile, int64_t rows, A scale, Complex<Vector<A>>* bins,
                  Complex<Vector<A>>*) {
  for (int64_t h = 0; h < rows; ++h, bins += N / 2 + 1) {
    fft_real_forward<N>([&](int w) SKD_INLINED { return tile.load(h * N + w); },
                        [&](int k, Complex<Vector<A>> x) SKD_INLINED { bins[k] = {x.re * scale, x.im * scale}; });
  }
}

template <int N, class A>
void bins_to_rows(const FftPlan<A>&, const Complex<Vector<A>>* bins, int64_t rows, A scale, TileLanes<A> tile,
                  Complex<Vector<A>>*) {
  for (int64_t h = 0; h < rows; ++h, bins += N / 2 + 1) {
    fft_half_adjoint<N>([&](int k) SKD_INLINED { return bins[k]; },
                        [&](int w, Vector<A> x) SKD_INLINED { tile.store(h * N + w, x * scale); });
  }
}

template <int N, bool kBackward, class A>
void transform_columns(const FftPlan<A>&, Complex<Vector<A>>* bins, int64_t columns, Complex<Vector<A>>*) {
  for (int64_t k = 0; k < columns; ++k) {
    const auto load = [&](int h) SKD_INLINED { return bins[h * columns + k]; };
    const auto store = [&](int h, Complex<Vector<A>> x) SKD_INLINED { bins[h * columns + k] = x; };
    kBackward ? fft_backward<N>(load, store) : fft_forward<N>(load, store);
  }
}

// --- Any length ---

// Through an array, so that the passes are compiled once for all of what follows. `work` holds plan.work.
template <class A>
__attribute__((noinline)) void transform_array(const FftPlan<A>& plan, Complex<Vector<A>>* work) {
  fft_forward(plan, work, work + plan.points);
}

template <class A>
void rows_to_bins_by_plan(const FftPlan<A>& plan, TileLanes<A> tile, int64_t rows, A scale, Complex<Vector<A>>* bins,
                          Complex<Vector<A>>* work) {
  const int n = plan.points;
  for (int64_t h = 0; h < rows; ++h, bins += plan.length / 2 + 1) {
    const int64_t row = h * plan.length;
    for (int j = 0; j < n; ++j) {
      work[j].re = plan.packed ? tile.load(row + 2 * j) : tile.load(row + j);
      work[j].im = plan.packed ? tile.load(row + 2 * j + 1) : Vector<A>{};
    }
    transform_array(plan, work);
    const auto store = [&](int k, Complex<Vector<A>> x) { bins[k] = {x.re * scale, x.im * scale}; };
    for (int k = 0; 2 * k <= n; ++k) {
      if (plan.packed) {
        fft_bins_of_halves(plan, k, FromArray<Vector<A>>{work}, store);
      } else {
        store(k, work[k]);
      }
    }
  }
}

template <class A>
void bins_to_rows_by_plan(const FftPlan<A>& plan, const Complex<Vector<A>>* bins, int64_t rows, A scale,
                          TileLanes<A> tile, Complex<Vector<A>>* work) {
  const int n = plan.points;
  for (int64_t h = 0; h < rows; ++h, bins += plan.length / 2 + 1) {
    const int64_t row = h * plan.length;
    for (int k = 0; plan.packed && 2 * k <= n; ++k) {
      fft_halves_of_bins(plan, k, FromArray<Vector<A>>{bins}, ToArray<Vector<A>>{work});
    }
    for (int k = 0; k < n; ++k) {
      work[k] = plan.packed ? skd::exchanged(work[k]) : 2 * k <= n ? skd::exchanged(bins[k]) : Complex<Vector<A>>{};
    }
    transform_array(plan, work);
    for (int j = 0; j < n; ++j) {
      if (plan.packed) {
        tile.store(row + 2 * j, work[j].im * scale);
        tile.store(row + 2 * j + 1, work[j].re * scale);
      } else {
        tile.store(row + j, work[j].im * scale);
      }
    }
  }
}

template <bool kBackward, class A>
void transform_columns_by_plan(const FftPlan<A>& plan, Complex<Vector<A>>* bins, int64_t columns,
                               Complex<Vector<A>>* work) {
  for (int64_t k = 0; k < columns; ++k) {
    Complex<Vector<A>>* const column = bins + k;
    for (int h = 0; h < plan.length; ++h)
      work[h] = kBackward ? skd::exchanged(column[h * columns]) : column[h * columns];
    transform_array(plan, work);
    for (int h = 0; h < plan.length; ++h) column[h * columns] = kBackward ? skd::exchanged(work[h]) : work[h];
  }
}

// --- Planes of one size ---

template <class A>
class HalfSpectrum {
 public:
  typedef Complex<Vector<A>> Bin;

  HalfSpectrum(int64_t height, int64_t columns)
      : height_(height),
        columns_(columns),
        row_tables_(int(columns), FftKind::real),
        column_tables_(int(height), FftKind::complex),
        row_plan_(row_tables_.plan()),
        column_plan_(column_tables_.plan()) {
    if constexpr (sizeof(A) == sizeof(float)) {  // the usual models at 224 and 256 pixels
      choose_rows(std::integer_sequence<int, 4, 7, 8, 14, 16, 28, 32, 56>());
      choose_columns(std::integer_sequence<int, 4, 7, 8, 14, 16, 28, 32, 56>());
    }
  }
  HalfSpectrum(const HalfSpectrum&) = delete;
  HalfSpectrum& operator=(const HalfSpectrum&) = delete;

  int64_t size() const { return height_ * (columns_ / 2 + 1); }
  int64_t work() const { return row_plan_.work > column_plan_.work ? row_plan_.work : column_plan_.work; }

  // bins = scale * rfft2(tile)
  void forward(TileLanes<A> tile, A scale, Bin* bins, Bin* work) const {
    to_bins_(row_plan_, tile, height_, scale, bins, work);
    columns_forward_(column_plan_, bins, columns_ / 2 + 1, work);
  }
  // tile = scale * the transpose of rfft2 as a map of real numbers, of bins, which are used up
  void adjoint(Bin* bins, A scale, TileLanes<A> tile, Bin* work) const {
    columns_backward_(column_plan_, bins, columns_ / 2 + 1, work);
    to_rows_(row_plan_, bins, height_, scale, tile, work);
  }

 private:
  template <int... N>
  void choose_rows(std::integer_sequence<int, N...>) {
    ((columns_ == N ? void((to_bins_ = rows_to_bins<N, A>, to_rows_ = bins_to_rows<N, A>)) : void()), ...);
  }
  template <int... N>
  void choose_columns(std::integer_sequence<int, N...>) {
    ((height_ == N
          ? void((columns_forward_ = transform_columns<N, false, A>, columns_backward_ = transform_columns<N, true, A>))
          : void()),
     ...);
  }

  int64_t height_, columns_;
  FftTables<A> row_tables_, column_tables_;
  FftPlan<A> row_plan_, column_plan_;
  void (*to_bins_)(const FftPlan<A>&, TileLanes<A>, int64_t, A, Bin*, Bin*) = rows_to_bins_by_plan<A>;
  void (*to_rows_)(const FftPlan<A>&, const Bin*, int64_t, A, TileLanes<A>, Bin*) = bins_to_rows_by_plan<A>;
  void (*columns_forward_)(const FftPlan<A>&, Bin*, int64_t, Bin*) = transform_columns_by_plan<false, A>;
  void (*columns_backward_)(const FftPlan<A>&, Bin*, int64_t, Bin*) = transform_columns_by_plan<true, A>;
};

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd
