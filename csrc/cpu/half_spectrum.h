// rfft2 of a vector of planes, a lane for each, and its adjoint.
//
// A tile, or a map, holds positions of some lanes; the half spectrum of a vector of lanes is [H][W//2+1] complex
// vectors, of which the columns are transformed one by one, so that what is done to a column's bins finds them in the
// first-level cache, for planes of any size.
#pragma once

#include <optional>

#include "common/fft_lengths.h"
#include "common/fourier_compare.h"
#include "cpu/prefetch.h"
#include "cpu/simd.h"
#include "cpu/tile_lanes.h"

namespace skd {
namespace SKD_ISA {
namespace {

// --- Lengths with a codelet ---

template <int N, class A>
void rows_to_bins(const FftPlan<A>&, TileLanes<A> tile, int64_t rows, Complex<Vector<A>>* bins, Complex<Vector<A>>*,
                  Prefetcher& prefetcher) {
  for (int64_t h = 0; h < rows; ++h, bins += N / 2 + 1) {
    prefetcher.step();
    fft_real_forward<N>([&](int w) SKD_INLINED { return tile.load(h * N + w); },
                        [&](int k, Complex<Vector<A>> x) SKD_INLINED { bins[k] = x; });
  }
}

template <int N, class A>
void bins_to_rows(const FftPlan<A>&, const Complex<Vector<A>>* bins, int64_t rows, A scale, TileLanes<A> tile,
                  Complex<Vector<A>>*, Prefetcher& prefetcher) {
  for (int64_t h = 0; h < rows; ++h, bins += N / 2 + 1) {
    prefetcher.step();
    fft_half_adjoint<N>([&](int k) SKD_INLINED { return bins[k]; },
                        [&](int w, Vector<A> x) SKD_INLINED { tile.store(h * N + w, x * scale); });
  }
}

// A column of bins, `stride` apart, and its transform, side by side.
template <int N, class A>
void column_to_bins(const FftPlan<A>&, const Complex<Vector<A>>* bins, int64_t stride, Complex<Vector<A>>* column,
                    Complex<Vector<A>>*) {
  fft_forward<N>([&](int h) SKD_INLINED { return bins[h * stride]; },
                 [&](int k, Complex<Vector<A>> x) SKD_INLINED { column[k] = x; });
}

template <int N, class A>
void bins_to_column(const FftPlan<A>&, const Complex<Vector<A>>* column, int64_t stride, Complex<Vector<A>>* bins,
                    Complex<Vector<A>>*) {
  fft_backward<N>([&](int k) SKD_INLINED { return column[k]; },
                  [&](int h, Complex<Vector<A>> x) SKD_INLINED { bins[h * stride] = x; });
}

// A column of real numbers, of whose transform the lower half is enough.
template <int N, class A>
void real_column_to_bins(const FftPlan<A>&, const Complex<Vector<A>>* bins, int64_t stride, Complex<Vector<A>>* column,
                         Complex<Vector<A>>*) {
  fft_real_forward<N>([&](int h) SKD_INLINED { return bins[h * stride].re; },
                      [&](int k, Complex<Vector<A>> x) SKD_INLINED { column[k] = x; });
}

template <int N, class A>
void bins_to_real_column(const FftPlan<A>&, const Complex<Vector<A>>* column, int64_t stride, Complex<Vector<A>>* bins,
                         Complex<Vector<A>>*) {
  fft_half_adjoint<N>([&](int k) SKD_INLINED { return column[k]; },
                      [&](int h, Vector<A> x) SKD_INLINED { bins[h * stride].re = x; });
}

// --- Any length ---

// Through an array, so that the passes are compiled once for all of what follows. `work` holds plan.work.
template <class A>
__attribute__((noinline)) void transform_array(const FftPlan<A>& plan, Complex<Vector<A>>* work) {
  fft_forward(plan, work, work + plan.points);
}

template <class A>
void rows_to_bins_by_plan(const FftPlan<A>& plan, TileLanes<A> tile, int64_t rows, Complex<Vector<A>>* bins,
                          Complex<Vector<A>>* work, Prefetcher& prefetcher) {
  const int n = plan.points;
  for (int64_t h = 0; h < rows; ++h, bins += plan.length / 2 + 1) {
    prefetcher.step();
    const int64_t row = h * plan.length;
    for (int j = 0; j < n; ++j) {
      work[j].re = plan.packed ? tile.load(row + 2 * j) : tile.load(row + j);
      work[j].im = plan.packed ? tile.load(row + 2 * j + 1) : Vector<A>{};
    }
    transform_array(plan, work);
    const auto store = [&](int k, Complex<Vector<A>> x) { bins[k] = x; };
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
                          TileLanes<A> tile, Complex<Vector<A>>* work, Prefetcher& prefetcher) {
  const int n = plan.points;
  for (int64_t h = 0; h < rows; ++h, bins += plan.length / 2 + 1) {
    prefetcher.step();
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

template <class A>
void column_to_bins_by_plan(const FftPlan<A>& plan, const Complex<Vector<A>>* bins, int64_t stride,
                            Complex<Vector<A>>* column, Complex<Vector<A>>* work) {
  for (int h = 0; h < plan.length; ++h) work[h] = bins[h * stride];
  transform_array(plan, work);
  for (int k = 0; k < plan.length; ++k) column[k] = work[k];
}

template <class A>
void bins_to_column_by_plan(const FftPlan<A>& plan, const Complex<Vector<A>>* column, int64_t stride,
                            Complex<Vector<A>>* bins, Complex<Vector<A>>* work) {
  for (int k = 0; k < plan.length; ++k) work[k] = skd::exchanged(column[k]);
  transform_array(plan, work);
  for (int h = 0; h < plan.length; ++h) bins[h * stride] = skd::exchanged(work[h]);
}

// --- Planes of one size ---

template <class A>
class HalfSpectrum {
 public:
  typedef Complex<Vector<A>> Bin;

  HalfSpectrum(int64_t height, int64_t width) : height_(height), width_(width) {
    if constexpr (sizeof(A) == sizeof(float)) {  // the usual models at 224 and 256 pixels
      choose_rows(std::integer_sequence<int, 4, 7, 8, 14, 16, 28, 32, 56>());
      choose_columns(std::integer_sequence<int, 4, 7, 8, 14, 16, 28, 32, 56>());
    }
    if (rows_.to_bins == nullptr) {
      row_tables_.emplace(int(width), FftKind::real);
      row_plan_ = row_tables_->plan();
      rows_ = {rows_to_bins_by_plan<A>, bins_to_rows_by_plan<A>};
    }
    if (column_.forward == nullptr) {
      column_tables_.emplace(int(height), FftKind::complex);
      column_plan_ = column_tables_->plan();
      column_ = real_column_ = {column_to_bins_by_plan<A>, bins_to_column_by_plan<A>};
      real_columns_are_halved_ = false;
    }
  }
  HalfSpectrum(const HalfSpectrum&) = delete;
  HalfSpectrum& operator=(const HalfSpectrum&) = delete;

  int64_t height() const { return height_; }
  int64_t columns() const { return width_ / 2 + 1; }
  int64_t size() const { return height_ * columns(); }
  int64_t work() const { return row_plan_.work > column_plan_.work ? row_plan_.work : column_plan_.work; }

  // The columns 0 and width/2 are real before their transform, so that of its bins k and height - k one is enough.
  bool is_halved(int64_t column) const { return real_columns_are_halved_ && !is_inner(int(column), int(width_)); }
  int64_t bins_in_column(int64_t column) const { return is_halved(column) ? height_ / 2 + 1 : height_; }

  // Moves sums over planes, [columns][height] of some lanes each, to `sums`, [height][columns], where they do not
  // drift.
  void move_sums(Part<A>* of_lanes, double scale, double* sums) const {
    for (int64_t k = 0; k < columns(); ++k, of_lanes += height_) {
      for (int64_t h = 0; h < bins_in_column(k); ++h) {
        const double sum = sum_of_lanes(of_lanes[h]) * scale;
        sums[h * columns() + k] += sum;
        if (is_halved(k) && is_inner(int(h), int(height_))) sums[(height_ - h) * columns() + k] += sum;
        of_lanes[h] = Part<A>{};
      }
    }
  }

  // bins[height][columns] = the transforms of the tile's rows
  void rows_forward(TileLanes<A> tile, Bin* bins, Bin* work, Prefetcher& prefetcher) const {
    rows_.to_bins(row_plan_, tile, height_, bins, work, prefetcher);
  }
  // transformed[bins_in_column] = the transform of a column of these: of rfft2(tile), where it is halved the lower half
  void column_forward(const Bin* bins, int64_t column, Bin* transformed, Bin* work) const {
    (is_halved(column) ? real_column_ : column_).forward(column_plan_, bins + column, columns(), transformed, work);
  }
  // The transposes of both, as maps of real numbers, in the opposite order. Scales.
  void column_adjoint(const Bin* transformed, int64_t column, Bin* bins, Bin* work) const {
    (is_halved(column) ? real_column_ : column_).adjoint(column_plan_, transformed, columns(), bins + column, work);
  }
  void rows_adjoint(const Bin* bins, A scale, TileLanes<A> tile, Bin* work, Prefetcher& prefetcher) const {
    rows_.from_bins(row_plan_, bins, height_, scale, tile, work, prefetcher);
  }

 private:
  struct Rows {
    void (*to_bins)(const FftPlan<A>&, TileLanes<A>, int64_t rows, Bin*, Bin* work, Prefetcher&);
    void (*from_bins)(const FftPlan<A>&, const Bin*, int64_t rows, A scale, TileLanes<A>, Bin* work, Prefetcher&);
  };
  struct Column {
    void (*forward)(const FftPlan<A>&, const Bin* bins, int64_t stride, Bin* transformed, Bin* work);
    void (*adjoint)(const FftPlan<A>&, const Bin* transformed, int64_t stride, Bin* bins, Bin* work);
  };

  template <int... N>
  void choose_rows(std::integer_sequence<int, N...>) {
    ((width_ == N ? void(rows_ = {rows_to_bins<N, A>, bins_to_rows<N, A>}) : void()), ...);
  }
  template <int... N>
  void choose_columns(std::integer_sequence<int, N...>) {
    ((height_ == N ? void((column_ = {column_to_bins<N, A>, bins_to_column<N, A>},
                           real_column_ = {real_column_to_bins<N, A>, bins_to_real_column<N, A>}))
                   : void()),
     ...);
  }

  int64_t height_, width_;
  Rows rows_{};
  Column column_{}, real_column_{};
  bool real_columns_are_halved_ = true;
  std::optional<FftTables<A>> row_tables_, column_tables_;  // of lengths without a codelet
  FftPlan<A> row_plan_{}, column_plan_{};
};

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd
