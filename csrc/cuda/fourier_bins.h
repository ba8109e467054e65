// What fourier_align's kernels do with the bins of a tile, once both maps are transformed.
#pragma once

#include "common/alignment.h"
#include "common/fourier_compare.h"
#include "cuda/device.h"
#include "cuda/fourier_plan.h"

namespace skd {
namespace {

// --- Bins in memory ---

__device__ inline Complex<float> load_bin(const Bin* p) {
  const Bin bin = *p;
  return {bin.re, bin.im};
}
__device__ inline void store_bin(Bin* p, Complex<float> x) { *p = Bin{x.re, x.im}; }

// Quotients of indices. Those within shared memory are below 2^20, where a product with a reciprocal is exact.
template <class I>
struct Divisor {
  I divisor;
  __device__ explicit Divisor(I d) : divisor(d) {}
  __device__ I quotient(I i) const { return i / divisor; }
};
template <>
struct Divisor<int> {
  int divisor;
  float reciprocal;
  __device__ explicit Divisor(int d) : divisor(d), reciprocal(1.0f / float(d)) {}
  __device__ int quotient(int i) const { return int((float(i) + 0.5f) * reciprocal); }
};

// The spectra of a tile: planes of the student or of the difference, then those of the teacher. Indices are of type I.
template <class I>
struct TileSpectra {
  Bin* bins;
  I planes, counted;  // how many of them have a part in the loss and in the pooled magnitudes
  I array;            // bins from one array to the next
};

template <class I>
__device__ inline Complex<float> normalised(const Bin* p, const FourierLayer& layer) {
  const Complex<float> x = load_bin(p);
  return {x.re * layer.norm, x.im * layer.norm};
}

template <class I>
__device__ inline Compared<float> compare(const FourierLayer& layer, const TileSpectra<I>& spectra, const Bin* at) {
  const Complex<float> s = normalised<I>(at, layer);
  if (layer.compare == Compare::complex) return compare_complex(s, s, false);
  const bool logarithmic = layer.compare == Compare::log_magnitude;
  return compare_magnitudes(s, normalised<I>(at + spectra.array, layer), logarithmic);
}

// --- Steps ---

// Adds the tile's magnitudes to the block's sums, which lie in global memory.
template <class I>
__device__ inline void add_magnitudes(const FourierLayer& layer, const TileSpectra<I>& spectra, float* sums,
                                      bool first) {
  const I bins = I(layer.maps.height) * layer.row_bins;
  const Divisor<I> by_row(layer.row_bins);
  for (I i = threadIdx.x; i < bins; i += kThreads) {
    const I ky = by_row.quotient(i);
    const Bin* at = spectra.bins + ky * layer.row_pitch + (i - ky * layer.row_bins);
    float student = 0, teacher = 0;
    for (I p = 0; p < spectra.counted; ++p, at += layer.plane_pitch) {
      Complex<float> s = normalised<I>(at, layer);
      if (layer.with_teacher) {
        const Complex<float> t = normalised<I>(at + spectra.array, layer);
        if (layer.compare == Compare::complex) s = s + t;
        teacher += polar(t).size;
      }
      student += polar(s).size;
    }
    sums[i] = first ? student : sums[i] + student;
    if (layer.with_teacher) sums[bins + i] = first ? teacher : sums[bins + i] + teacher;
  }
}

// The largest squared difference of each plane, by a warp each.
template <class I>
__device__ inline void find_largest(const FourierLayer& layer, const TileSpectra<I>& spectra, float* largest) {
  const I bins = I(layer.maps.height) * layer.row_bins;
  const Divisor<I> by_row(layer.row_bins);
  for (I p = threadIdx.x / 32; p < spectra.planes; p += kThreads / 32) {
    const Bin* const plane = spectra.bins + p * layer.plane_pitch;
    float most = 0;
    for (I i = threadIdx.x % 32; i < bins; i += 32) {
      const I ky = by_row.quotient(i);
      const float squared = compare(layer, spectra, plane + ky * layer.row_pitch + (i - ky * layer.row_bins)).squared;
      most = squared > most ? squared : most;
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(kFullWarp, most, offset);
      most = other > most ? other : most;
    }
    if (threadIdx.x % 32 == 0) largest[p] = most;
  }
}

// Puts the gradient with respect to the student's bins in their place, with real and imaginary parts exchanged: then
// a transform forward is one backward. Returns the thread's share of the loss.
template <class I>
__device__ inline double compare_bins(const FourierLayer& layer, const TileSpectra<I>& spectra, const float* largest) {
  const I bins = I(layer.maps.height) * layer.row_bins, all = spectra.planes * bins;
  const Divisor<I> by_plane(bins), by_row(layer.row_bins);
  double sum = 0;
  for (I first = threadIdx.x; first < all; first += kThreads * kTermsInFloat) {
    const I end = all - first > kThreads * kTermsInFloat ? first + kThreads * kTermsInFloat : all;
    float part = 0;
    for (I i = first; i < end; i += kThreads) {
      const I p = by_plane.quotient(i), in_plane = i - p * bins;
      const I ky = by_row.quotient(in_plane);
      const int kx = int(in_plane - ky * layer.row_bins);
      Bin* const at = spectra.bins + p * layer.plane_pitch + ky * layer.row_pitch + kx;
      float weight = layer.bands != nullptr ? layer.bands[in_plane] : 1.0f;
      if (is_inner(kx, layer.maps.columns)) weight *= layer.inner_weight;
      const Compared<float> bin = compare(layer, spectra, at);
      if (layer.focal != 0) weight *= focal_weight(bin.squared, largest[p], layer.focal);
      if (p < spectra.counted) part += weight * bin.squared;
      store_bin(at, {bin.direction.im * weight, bin.direction.re * weight});
    }
    sum += part;
  }
  return sum;
}

// From both spectra, which all threads have stored before, to the gradient's. Ends with a barrier.
template <class I>
__device__ inline double work_on_bins(const FourierLayer& layer, const TileSpectra<I>& spectra, float* sums, bool first,
                                      float* largest) {
  if (layer.spectra != nullptr) {
    add_magnitudes(layer, spectra, sums, first);
    __syncthreads();
  }
  if (!layer.with_teacher) return 0;
  if (layer.focal != 0) {
    find_largest(layer, spectra, largest);
    __syncthreads();
  }
  const double sum = compare_bins(layer, spectra, largest);
  __syncthreads();
  return sum;
}

// --- Blocks and their tiles ---

struct Walk {
  int64_t tile, end, step;
  int64_t slot;  // where the block's sums are
};

// Block `block` of the layer's.
__device__ inline Walk walk_of_block(const FourierLayer& layer, int64_t block) {
  const int64_t group = block / layer.blocks;
  return {group * layer.tiles + block % layer.blocks, (group + 1) * layer.tiles, layer.blocks, block};
}

__device__ inline float* sums_of_block(const FourierLayer& layer, const Walk& walk) {
  if (layer.spectra == nullptr) return nullptr;
  return layer.sums + walk.slot * (layer.with_teacher ? 2 : 1) * layer.maps.height * layer.row_bins;
}

__device__ inline void write_share(const FourierLayer& layer, const Walk& walk, double sum, char* shared) {
  sum = sum_over_block(sum, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) layer.shares[walk.slot] = sum * layer.maps.loss_scale;
}

}  // namespace
}  // namespace skd
