// Planes whose rows fit in a few vectors (the usual feature maps, 7 to 56 columns wide): a row is read, compared,
// summed and its gradient written without leaving the registers.
#pragma once

#include "cpu/align_planes.h"

namespace skd {
namespace SKD_ISA {
namespace {

// A row of kColumns floats as vectors that cover exactly the row: the last one is shifted back to end with it, and its
// numbers that an earlier vector holds too are left out of sums by `fresh`.
template <int kColumns, bool kPartial = (kColumns < kWidth<float>)>
struct ShortRow {
  static constexpr int kCount = (kColumns + kWidth<float> - 1) / kWidth<float>;
  static constexpr int offset(int i) {
    return i * kWidth<float> <= kColumns - kWidth<float> ? i * kWidth<float> : kColumns - kWidth<float>;
  }
  static inline Vector<float> load(const float* row, int i) { return Access<float, float>::load(row + offset(i)); }
  static inline void store(float* row, int i, Vector<float> v) { Access<float, float>::store(row + offset(i), v); }
  static inline Vector<float> fresh(Vector<float> v, int i) {
    for (int lane = 0; lane < kWidth<float>; ++lane) {
      if (offset(i) + lane < i * kWidth<float>) v[lane] = 0;
    }
    return v;
  }
};

#if SKD_AVX512
template <int kColumns>
struct ShortRow<kColumns, true> {
  static constexpr int kCount = 1;
  static constexpr __mmask16 kMask = __mmask16((1u << kColumns) - 1);
  static inline Vector<float> load(const float* row, int) { return Vector<float>(_mm512_maskz_loadu_ps(kMask, row)); }
  static inline void store(float* row, int, Vector<float> v) { _mm512_mask_storeu_ps(row, kMask, __m512(v)); }
  static inline Vector<float> fresh(Vector<float> v, int) { return v; }
};
#elif defined(__AVX2__)
// Two halves, the second shifted back (masked stores are slow on some processors).
template <int kColumns>
struct ShortRow<kColumns, true> {
  static_assert(kColumns >= 4, "a half is four floats");
  static constexpr int kCount = 1;
  static inline Vector<float> load(const float* row, int) {
    return Vector<float>(_mm256_loadu2_m128(row + kColumns - 4, row));
  }
  static inline void store(float* row, int, Vector<float> v) {
    _mm256_storeu2_m128(row + kColumns - 4, row, __m256(v));
  }
  static inline Vector<float> fresh(Vector<float> v, int) {
    for (int lane = 4; lane < 12 - kColumns; ++lane) v[lane] = 0;
    return v;
  }
};
#endif

// A group of short rows asks for memory in too many short stretches for the processor to foresee. Fetching past the end
// of a map does no harm.
constexpr int kFloatsAhead = 512;
template <int kColumns>
inline void fetch_ahead(const float* row) {
  for (int w = 0; w < kColumns; w += 16) __builtin_prefetch(row + w);
}

struct ShortRowSums {
  DoubleSum<float> squares, row_squares;
};

// Rows one after another in student and gradient; the teacher's are averaged over kCount planes.
template <int kColumns, int kCount, bool kGradient>
void align_short_rows(const float* student, const float* teacher, int64_t teacher_stride, float* gradient, int64_t rows,
                      float row_weight, float gradient_scale, ShortRowSums& sums) {
  using Row = ShortRow<kColumns>;
  const float sum_scale = row_weight * gradient_scale;
  constexpr int64_t kRowsInFloat = kTermsInFloat / Row::kCount > 0 ? kTermsInFloat / Row::kCount : 1;
  Vector<float> squares{}, row_squares{};
  for (int64_t h = 0; h < rows; ++h, student += kColumns, teacher += kColumns, gradient += kColumns) {
    fetch_ahead<kColumns>(student + kFloatsAhead);
    // The next channel's planes, if this row's are averaged over several.
    const float* next = teacher + (kCount == 1 ? kFloatsAhead : kCount * teacher_stride);
    for (int c = 0; c < kCount; ++c) fetch_ahead<kColumns>(next + c * teacher_stride);
    Vector<float> d[Row::kCount], sum{};
    for (int i = 0; i < Row::kCount; ++i) {
      Vector<float> t = Row::load(teacher, i);
      for (int c = 1; c < kCount; ++c) t += Row::load(teacher + c * teacher_stride, i);
      d[i] = Row::load(student, i) - (kCount == 1 ? t : t * (1.0f / kCount));
      const Vector<float> fresh = Row::fresh(d[i], i);
      sum += fresh;
      squares += fresh * fresh;
    }
    sum = sum_over_lanes<float, kColumns % 2 ? 1 : 2>(sum);
    row_squares += sum * sum;
    if ((h + 1) % kRowsInFloat == 0 || h + 1 == rows) {
      sums.squares.add(squares);
      sums.row_squares.add(row_squares);
      squares = row_squares = Vector<float>{};
    }
    if (!kGradient) continue;
    sum *= sum_scale;
    for (int i = 0; i < Row::kCount; ++i) Row::store(gradient, i, scaled_gradient(d[i], gradient_scale, sum));
  }
}

typedef void (*ShortRows)(const float*, const float*, int64_t, float*, int64_t, float, float, ShortRowSums&);

template <int kColumns>
ShortRows short_rows_of_width(int64_t count, bool with_gradient) {
  switch (count) {
    case 1: return with_gradient ? align_short_rows<kColumns, 1, true> : align_short_rows<kColumns, 1, false>;
    case 2: return with_gradient ? align_short_rows<kColumns, 2, true> : align_short_rows<kColumns, 2, false>;
    case 4: return with_gradient ? align_short_rows<kColumns, 4, true> : align_short_rows<kColumns, 4, false>;
    default: return nullptr;
  }
}

// The loop for float32 rows of this length and a teacher of `count` times the channels, or null if there is none.
inline ShortRows short_rows(int64_t columns, int64_t count, bool with_gradient) {
  switch (columns) {  // the usual models at 224 and 256 pixels
    case 7: return short_rows_of_width<7>(count, with_gradient);
    case 8: return short_rows_of_width<8>(count, with_gradient);
    case 14: return short_rows_of_width<14>(count, with_gradient);
    case 16: return short_rows_of_width<16>(count, with_gradient);
    case 28: return short_rows_of_width<28>(count, with_gradient);
    case 32: return short_rows_of_width<32>(count, with_gradient);
    case 56: return short_rows_of_width<56>(count, with_gradient);
    default: return nullptr;
  }
}

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd
