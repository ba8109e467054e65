// Magnitudes of real transforms over many channels, a lane for each transform.
//
// Of N = radix * M numbers the first pass transforms those that are M apart. Bin q of these transforms, turned by
// exp(-2 pi i j q / N), is a row of M complex numbers, and the transform of that row is every radix-th bin of the
// whole, from q on. The rows 0 < q < radix / 2 yield all bins that are no multiples of radix / 2, once each but for
// conjugation; the multiples are the real transform of the 2M sums of numbers that are 2M apart. So nothing is computed
// twice, there is no pass that takes two halves apart (as in common/fft_lengths.h), and what the second pass transforms
// is short enough for a codelet and for the first-level cache.
#pragma once

#include <vector>

#include "common/fft_lengths.h"
#include "cpu/simd.h"

namespace skd {
namespace SKD_ISA {
namespace {

// Calls f(Index<radix>(), Index<M>()) for a number of channels, if there are codelets for it.
template <class F>
inline bool for_radix_and_row(int64_t channels, F f) {
  switch (channels) {
    case 64: f(Index<8>(), Index<8>()); return true;
    case 96: f(Index<8>(), Index<12>()); return true;
    case 128: f(Index<16>(), Index<8>()); return true;
    case 192: f(Index<16>(), Index<12>()); return true;
    case 256: f(Index<16>(), Index<16>()); return true;
    case 320: f(Index<16>(), Index<20>()); return true;
    case 384: f(Index<16>(), Index<24>()); return true;
    case 512: f(Index<16>(), Index<32>()); return true;
    case 640: f(Index<16>(), Index<40>()); return true;
    case 768: f(Index<16>(), Index<48>()); return true;
    case 1024: f(Index<16>(), Index<64>()); return true;
    case 1280: f(Index<16>(), Index<80>()); return true;
    case 1536: f(Index<16>(), Index<96>()); return true;
    case 2048: f(Index<16>(), Index<128>()); return true;
    default: return false;
  }
}

class ChannelSpectrum {
 public:
  typedef Vector<float> V;

  // Whether there is one for this number of channels.
  static bool serves(int64_t channels) {
    return for_radix_and_row(channels, [](auto, auto) {});
  }

  explicit ChannelSpectrum(int channels)
      : channels_(channels),
        radix_(channels < 128 ? 8 : 16),
        row_(channels / radix_),
        folded_(2 * row_, FftKind::real) {
    for (int j = 0; j < row_; ++j) {
      for (int q = 1; q < radix_ / 2; ++q) {
        const Root root = root_of_unity(j * q, channels);
        twiddles_.push_back({float(root.re), float(root.im)});
      }
    }
    std::vector<int> order;  // in which a codelet stores its bins
    for_radix_and_row(channels, [&](auto, auto row) {
      fft_forward<row>([](int) SKD_INLINED { return Complex<float>{}; },
                       [&](int m, Complex<float>) { order.push_back(m); });
    });
    for (int q = 1; q < radix_ / 2; ++q) {
      for (int m : order) {
        const int bin = q + radix_ * m;
        bins_.push_back(2 * bin <= channels ? bin : channels - bin);
      }
    }
    order.clear();
    std::vector<Complex<float>> work(folded_.plan().work);
    fft_real_forward(
        folded_.plan(), [](int) { return 0.0f; }, [&](int k, Complex<float>) { order.push_back(k); }, work.data());
    for (int k : order) bins_.push_back(k * radix_ / 2);
  }

  int radix() const { return radix_; }
  int row() const { return row_; }

  // Which bins second_pass yields, in order.
  const std::vector<int>& bins() const { return bins_; }

  // Complex vectors that the two passes need between them.
  int64_t work() const { return (radix_ / 2 - 1) * row_ + row_ + folded_.plan().work; }

  // Columns gives the channels j, j + row(), j + 2 row(), ... of column j, one column after the other:
  // begin<kRadix, kRow>(j), and then load<kRow>(r) is channel j + kRow * r.
  template <class Columns>
  void first_pass(Columns columns, Complex<V>* work) const {
    for_radix_and_row(channels_,
                      [&](auto radix, auto row) SKD_INLINED { transform_columns<radix, row>(columns, work); });
  }

  // yield(X) gets the bins, or their conjugates, in the order of bins().
  template <class Yield>
  void second_pass(Complex<V>* work, Yield yield) const {
    const int rows = radix_ / 2 - 1;
    for_radix_and_row(channels_, [&](auto, auto length) SKD_INLINED {
      constexpr int M = length;
      for (int q = 0; q < rows; ++q) {
        const Complex<V>* const row = work + q * M;
        fft_forward<M>([&](int j) SKD_INLINED { return row[j]; }, [&](int, Complex<V> x) SKD_INLINED { yield(x); });
      }
    });
    const V* const folded = reinterpret_cast<const V*>(work + rows * row_);
    fft_real_forward(
        folded_.plan(), [&](int j) SKD_INLINED { return folded[j]; }, [&](int, Complex<V> x) SKD_INLINED { yield(x); },
        work + (rows + 1) * row_);
  }

 private:
  // The length of a row is a constant, for the sake of addresses, which would take as long as the arithmetic.
  template <int kRadix, int kRow, class Columns>
  __attribute__((noinline)) void transform_columns(Columns& columns, Complex<V>* work) const {
    constexpr int half = kRadix / 2;
    V* const folded = reinterpret_cast<V*>(work + (half - 1) * kRow);
    const Complex<float>* twiddle = twiddles_.data();
    for (int j = 0; j < kRow; ++j, twiddle += half - 1) {
      columns.template begin<kRadix, kRow>(j);
      V even{}, odd{};
      fft_real_forward<kRadix>([&](int r) SKD_INLINED { return columns.template load<kRow>(r); },
                               [&](int q, Complex<V> x) SKD_INLINED {
                                 if (q == 0) {
                                   even = x.re;
                                 } else if (q == half) {
                                   odd = x.re;
                                 } else {
                                   work[(q - 1) * kRow + j] = multiply(x, twiddle[q - 1].re, twiddle[q - 1].im);
                                 }
                               });
      folded[j] = 0.5f * (even + odd);
      folded[j + kRow] = 0.5f * (even - odd);
    }
  }

  int channels_, radix_, row_;
  FftTables<float> folded_;
  std::vector<Complex<float>> twiddles_;
  std::vector<int> bins_;
};

// --- Columns for the first pass ---

// Of a tile, a vector for each channel.
struct ColumnsOfTile {
  const float* tile;
  const float* column = nullptr;

  template <int kRadix, int kRow>
  SKD_INLINE void begin(int j) {
    column = tile + j * kWidth<float>;
  }
  template <int kRow>
  SKD_INLINE Vector<float> load(int r) const {
    return Access<float, float>::load(column + r * kRow * kWidth<float>);
  }
};

// Of contiguous planes. A few addresses are kept from which the processor finds the others by itself.
struct ColumnsOfPlanes {
  const float* quarter[4] = {};
  int64_t stride, row, rows3;  // numbers from a channel to the next, and to those `row` and 3 `row` further

  ColumnsOfPlanes(const float* first, int64_t stride, const ChannelSpectrum& spectrum)
      : stride(stride), row(stride * spectrum.row()), rows3(3 * row) {
    for (int i = 0; i < spectrum.radix() / 4; ++i) quarter[i] = first + 4 * i * row;
  }
  template <int kRadix, int kRow>
  SKD_INLINE void begin(int j) {
    for (int i = 0; j > 0 && i < kRadix / 4; ++i) quarter[i] += stride;
  }
  template <int kRow>
  SKD_INLINE Vector<float> load(int r) const {
    const float* const p = quarter[r / 4];
    const int i = r % 4;
    return Access<float, float>::load(i == 3 ? p + rows3 : i == 2 ? p + 2 * row : i == 1 ? p + row : p);
  }
};

// Of channels that lie together, at an address for each lane.
struct ColumnsOfLanes {
  static constexpr int kAtOnce = 4;  // columns; divides every row
  const float* const* lane;
  Vector<float> block[16 * kAtOnce];
  const Vector<float>* column = nullptr;

  explicit ColumnsOfLanes(const float* const* lane) : lane(lane) {}
  template <int kRadix, int kRow>
  SKD_INLINE void begin(int j) {
    if (j % kAtOnce == 0) {
      for (int r = 0; r < kRadix; ++r) load_transposed_fours(lane, j + r * kRow, block + r * kAtOnce);
    }
    column = block + j % kAtOnce;
  }
  template <int kRow>
  SKD_INLINE Vector<float> load(int r) const {
    return column[r * kAtOnce];
  }
};

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd
