// The arithmetic of spectral_align, for numbers and for vectors, on the host and on the device.
#pragma once

#include "common/channel_pool.h"

namespace skd {

// How many numbers of a kind are added up in float, one after another, before the sum goes where it cannot drift.
constexpr int kTermsInFloat = 16;

// Sums of a row of differences d over its even and its odd columns.
template <class V>
struct RowSums {
  V even, odd;
};

// Makes them the row's S, the whole row's sum in every column if the width is odd, and returns the row's sum of d * S.
template <class V>
SKD_HD inline V close_row(RowSums<V>& sums, bool odd_width) {
  if (odd_width) {
    sums.even += sums.odd;
    sums.odd = sums.even;
    return sums.even * sums.even;
  }
  return sums.even * sums.even + sums.odd * sums.odd;
}

// gradient_scale * (d + row_weight S), where scaled_sum is gradient_scale * row_weight * S.
template <class V, class A>
SKD_HD inline V scaled_gradient(V d, A gradient_scale, V scaled_sum) {
  return d * gradient_scale + scaled_sum;
}

}  // namespace skd
