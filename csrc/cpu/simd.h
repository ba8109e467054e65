// Vectors of the instruction set this file is compiled for (SKD_ISA), with loads and stores of every dtype.
//
// Everything here has internal linkage: the same header is compiled several times with different instructions, and a
// function shared between those objects could be run on a processor that lacks them.
#pragma once

#include <type_traits>

#include "common/alignment.h"
#include "common/fft_codelets.h"
#include "common/number_formats.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Whether vectors have 16 lanes. Set before by a source that is faster with 8, and by a test that runs the code for 16
// on processors without AVX-512 (tests/native).
#if !defined(SKD_AVX512)
#if defined(__AVX512F__)
#define SKD_AVX512 1
#else
#define SKD_AVX512 0
#endif
#endif

namespace skd {
namespace SKD_ISA {
namespace {

#if SKD_AVX512
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Vectors to transpose planes with, of 32 bytes at most: on Zen 4 it takes twice as long with larger ones, from rows
// that begin anywhere in a line.
constexpr int kPartBytes = kVectorBytes < 32 ? kVectorBytes : 32;

template <class A, int kBytes = kVectorBytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(kBytes)));
  typedef std::conditional_t<sizeof(A) == 8, int64_t, std::conditional_t<sizeof(A) == 4, int32_t, int16_t>> Integer;
  typedef Integer index __attribute__((vector_size(kBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
using Part = typename VectorOf<A, kPartBytes>::type;
template <class A>
constexpr int kWidth = kVectorBytes / int(sizeof(A));
template <class A>
constexpr int kPart = kPartBytes / int(sizeof(A));

typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class T>
inline V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

#if defined(__F16C__)
inline void load_halves(const float16* p, VectorOf<float, 32>::type& v) {
  v = VectorOf<float, 32>::type(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store_halves(float16* p, VectorOf<float, 32>::type v) {
  const __m128i out = _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), out);
}
#endif
#if SKD_AVX512
// Masked, with all lanes: of the plain ones GCC 12 believes that they read an uninitialised number.
inline void load_halves(const float16* p, VectorOf<float, 64>::type& v) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  v = VectorOf<float, 64>::type(_mm512_maskz_cvtph_ps(0xffff, halves));
}
inline void store_halves(float16* p, VectorOf<float, 64>::type v) {
  const __m256i out = _mm512_maskz_cvtps_ph(0xffff, __m512(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), out);
}
#endif

// As many consecutive numbers as V has lanes.
template <class V, class T>
struct VectorAccess {
  typedef Element<V> A;
  static constexpr int kNumbers = int(sizeof(V) / sizeof(A));
#if defined(__F16C__)
  static constexpr bool kHasHalves = true;
#else
  static constexpr bool kHasHalves = false;
#endif
  typedef typename VectorOf<uint32_t, 4 * kNumbers>::type Bits;
  typedef typename VectorOf<uint16_t, 2 * kNumbers>::type Upper;

  static inline V load(const T* p) {
    V v;
    if constexpr (std::is_same<A, T>::value) {
      v = load_bits<V>(p);
    } else if constexpr (std::is_same<A, float>::value && std::is_same<T, bfloat16>::value) {
      v = bit_cast<V>(__builtin_convertvector(load_bits<Upper>(p), Bits) << 16);
    } else if constexpr (std::is_same<A, float>::value && std::is_same<T, float16>::value && kHasHalves) {
      load_halves(p, v);
    } else {
      for (int i = 0; i < kNumbers; ++i) v[i] = A(to_float(p[i]));
    }
    return v;
  }

  static inline void store(T* p, V v) {
    if constexpr (std::is_same<A, T>::value) {
      __builtin_memcpy(p, &v, sizeof v);
    } else if constexpr (std::is_same<A, float>::value && std::is_same<T, bfloat16>::value) {
      const Bits bits = bit_cast<Bits>(v);
      const Bits rounded = bits + 0x7fff + (bits >> 16 & 1);
      const Bits is_nan = bit_cast<Bits>(v != v);
      const Bits kept = (is_nan & (bits | 0x400000)) | (~is_nan & rounded);
      const Upper out = __builtin_convertvector(kept >> 16, Upper);
      __builtin_memcpy(p, &out, sizeof out);
    } else if constexpr (std::is_same<A, float>::value && std::is_same<T, float16>::value && kHasHalves) {
      store_halves(p, v);
    } else {
      for (int i = 0; i < kNumbers; ++i) from_float(v[i], p[i]);
    }
  }
};
template <class A, class T>
using Access = VectorAccess<Vector<A>, T>;

// Stores past the caches, to an address aligned to a vector; finish_streams() before anybody else may read.
template <class A>
inline void stream(A* p, Vector<A> v) {
#if SKD_AVX512
  _mm512_stream_ps(reinterpret_cast<float*>(p), bit_cast<__m512>(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(p), bit_cast<__m256>(v));
#elif defined(__x86_64__)
  _mm_stream_ps(reinterpret_cast<float*>(p), bit_cast<__m128>(v));
#else
  Access<A, A>::store(p, v);
#endif
}

inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <int... I>
struct Lanes {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using type = Lanes<I...>;
};
template <class V>
using LanesOf = typename CountTo<int(sizeof(V) / sizeof(Element<V>))>::type;
template <class A>
using AllLanes = LanesOf<Vector<A>>;

// Numbers of a and b in the order of the indices, which count through both.
#if defined(__clang__) || __GNUC__ >= 12
#define SKD_SHUFFLE(A, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SKD_SHUFFLE(A, a, b, ...) __builtin_shuffle(a, b, typename VectorOf<A, int(sizeof(a))>::index{__VA_ARGS__})
#endif

// Every second of the 2n numbers a, b, from `First` on.
template <class A, int First, int... I>
inline Vector<A> every_second(Vector<A> a, Vector<A> b, Lanes<I...>) {
  return SKD_SHUFFLE(A, a, b, (2 * I + First)...);
}

// a b a b ... from number `First` of each on.
template <int First, class V, int... I>
inline V interleaved(V a, V b, Lanes<I...>) {
  return SKD_SHUFFLE(Element<V>, a, b, (First + I / 2 + (I % 2) * int(sizeof...(I)))...);
}

// Of every four numbers of a and of b: two from `First` on in turn (a b a b), or as pairs (a a b b).
template <class A, int First, int... I>
inline Vector<A> in_turn_by_fours(Vector<A> a, Vector<A> b, Lanes<I...>) {
  return SKD_SHUFFLE(A, a, b, (I / 4 * 4 + First + I % 4 / 2 + I % 2 * kWidth<A>)...);
}
template <class A, int First, int... I>
inline Vector<A> pairs_by_fours(Vector<A> a, Vector<A> b, Lanes<I...>) {
  return SKD_SHUFFLE(A, a, b, (I / 4 * 4 + First + I % 2 + I % 4 / 2 * kWidth<A>)...);
}

// Every lane's number goes to the lane whose index differs in the bits of Step.
template <class A, int Step, int... I>
inline Vector<A> exchanged(Vector<A> v, Lanes<I...>) {
  return SKD_SHUFFLE(A, v, v, (I ^ Step)...);
}

// x[2i] + x[2i+1] over the two vectors a, b in order.
template <class A>
inline Vector<A> add_pairs(Vector<A> a, Vector<A> b) {
#if defined(__AVX2__) && !SKD_AVX512
  if constexpr (kWidth<A> == 8) {
    const __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(__m256(a), __m256(b)));
    return Vector<A>(_mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0xd8)));
  }
#endif
  return every_second<A, 0>(a, b, AllLanes<A>()) + every_second<A, 1>(a, b, AllLanes<A>());
}

// Whether a comparison holds in any lane.
template <class Index>
inline bool any(Index condition) {
#if SKD_AVX512
  return _mm512_test_epi32_mask(__m512i(condition), __m512i(condition)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(__m256i(condition), __m256i(condition));
#elif defined(__x86_64__)
  return _mm_movemask_epi8(__m128i(condition)) != 0;
#else
  for (int i = 0; i < int(sizeof(Index) / sizeof(condition[0])); ++i) {
    if (condition[i]) return true;
  }
  return false;
#endif
}

// A sum of vectors in double, lane by lane. Sums of squares go here after kTermsInFloat terms: a float that adds up
// more of them is off by more than a millionth where all are alike.

template <class A>
class DoubleSum {
 public:
  inline void add(Vector<A> v) {
    if constexpr (sizeof(A) == sizeof(double)) {
      parts_[0] += v;
    } else {
      typedef A Half __attribute__((vector_size(kVectorBytes / 2)));
      Half halves[2];
      __builtin_memcpy(halves, &v, sizeof v);
      for (int i = 0; i < kParts; ++i) parts_[i] += __builtin_convertvector(halves[i], Vector<double>);
    }
  }
  inline double lane(int i) const { return parts_[i / kWidth<double>][i % kWidth<double>]; }
  inline double total(int lanes = kWidth<A>) const {
    double sum = 0;
    for (int i = 0; i < lanes; ++i) sum += lane(i);
    return sum;
  }

 private:
  static constexpr int kParts = int(sizeof(double) / sizeof(A));
  Vector<double> parts_[kParts] = {};
};

// In halves, then halves of these.
template <int n>
inline double sum_of_doubles(const typename VectorOf<double, n * 8>::type& v) {
  if constexpr (n == 2) {
    return v[0] + v[1];
  } else {
    typename VectorOf<double, n * 4>::type halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    return sum_of_doubles<n / 2>(halves[0] + halves[1]);
  }
}
template <class V>
inline double sum_of_lanes(V v) {
  constexpr int n = int(sizeof(V) / sizeof(Element<V>));
  return sum_of_doubles<n>(__builtin_convertvector(v, typename VectorOf<double, n * 8>::type));
}

// As many sums of a vector's lanes as a part has.
template <class A>
inline Part<A> folded(Vector<A> v) {
  if constexpr (kPartBytes == kVectorBytes) {
    return v;
  } else {
    Part<A> halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    return halves[0] + halves[1];
  }
}

#if defined(__AVX2__)
// Pairs, then quadruples, of rows i and i + 2 within halves of 128 bits.
inline void transpose_fours(const __m256* rows, __m256* fours) {
  __m256 pair[4];
  for (int i = 0; i < 4; i += 2) {
    pair[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  fours[0] = _mm256_shuffle_ps(pair[0], pair[2], 0x44);
  fours[1] = _mm256_shuffle_ps(pair[0], pair[2], 0xee);
  fours[2] = _mm256_shuffle_ps(pair[1], pair[3], 0x44);
  fours[3] = _mm256_shuffle_ps(pair[1], pair[3], 0xee);
}
#endif

// The transpose of a square block of as many rows as V has lanes.
template <class V>
inline void transpose(V* rows) {
  constexpr int n = int(sizeof(V) / sizeof(rows[0][0]));
#if defined(__AVX2__)
  if constexpr (n == 8 && sizeof(V) == 32) {  // fours within halves, then the halves: 24 shuffles
    __m256 given[8], four[8];
    for (int i = 0; i < 8; ++i) given[i] = __m256(rows[i]);
    transpose_fours(given, four);
    transpose_fours(given + 4, four + 4);
    for (int i = 0; i < 4; ++i) {
      rows[i] = V(_mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
      rows[i + 4] = V(_mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
    }
    return;
  }
#endif
  // Interleaving row i with row i + n/2, log2(n) times over, carries every element across the diagonal.
  V other[n];
  V *from = rows, *to = other;
  for (int step = n; step > 1; step /= 2) {
    for (int i = 0; i < n / 2; ++i) {
      to[2 * i] = interleaved<0>(from[i], from[i + n / 2], LanesOf<V>());
      to[2 * i + 1] = interleaved<n / 2>(from[i], from[i + n / 2], LanesOf<V>());
    }
    V* swap = from;
    from = to;
    to = swap;
  }
  if (from != rows) {
    for (int i = 0; i < n; ++i) rows[i] = from[i];
  }
}

#if defined(__AVX2__)
// Four vectors of 32 bytes, `step` apart, transposed: every lane's numbers to an address of its own, `apart` from each
// other. Two thirds of the shuffles of square blocks, and no write across two lines if these addresses are multiples of
// 16 bytes.
inline void store_transposed_fours(const float* vectors, int64_t step, float* out, int64_t apart) {
  __m256 rows[4], four[4];
  for (int i = 0; i < 4; ++i) rows[i] = _mm256_loadu_ps(vectors + i * step);
  transpose_fours(rows, four);
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_ps(out + i * apart, _mm256_castps256_ps128(four[i]));
    _mm_storeu_ps(out + (i + 4) * apart, _mm256_extractf128_ps(four[i], 1));
  }
}
#endif

// Four numbers at each of as many addresses as there are lanes, transposed: with fewer shuffles than square blocks, as
// the halves of a vector are loaded to where they belong.
inline void load_transposed_fours(const float* const* lane, int64_t offset, Vector<float>* columns) {
  typedef Vector<float> V;
  V rows[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX2__) && !SKD_AVX512
    const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(lane[i] + offset));
    rows[i] = V(_mm256_insertf128_ps(low, _mm_loadu_ps(lane[i + 4] + offset), 1));
#else
    float numbers[kWidth<float>];
    for (int k = 0; k < kWidth<float>; k += 4) __builtin_memcpy(numbers + k, lane[i + k] + offset, 4 * sizeof(float));
    __builtin_memcpy(&rows[i], numbers, sizeof numbers);
#endif
  }
  constexpr AllLanes<float> all;
  const V low[2] = {in_turn_by_fours<float, 0>(rows[0], rows[1], all),
                    in_turn_by_fours<float, 0>(rows[2], rows[3], all)};
  const V high[2] = {in_turn_by_fours<float, 2>(rows[0], rows[1], all),
                     in_turn_by_fours<float, 2>(rows[2], rows[3], all)};
  columns[0] = pairs_by_fours<float, 0>(low[0], low[1], all);
  columns[1] = pairs_by_fours<float, 2>(low[0], low[1], all);
  columns[2] = pairs_by_fours<float, 0>(high[0], high[1], all);
  columns[3] = pairs_by_fours<float, 2>(high[0], high[1], all);
}

// The sum of every vector's lanes.
template <class A>
inline Vector<A> sums_of_lanes(const Vector<A>* vectors) {
  constexpr int n = kWidth<A>;
  Vector<A> sums[n];
  for (int i = 0; i < n; ++i) sums[i] = vectors[i];
  for (int count = n; count > 1; count /= 2) {
    for (int i = 0; i < count / 2; ++i) sums[i] = add_pairs<A>(sums[2 * i], sums[2 * i + 1]);
  }
  return sums[0];
}

}  // namespace
}  // namespace SKD_ISA
}  // namespace skd
