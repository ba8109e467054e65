// The few AVX-512 instructions the kernels name, in plain C++, for a test build with SKD_AVX512=1 on any processor.
// Vectors of 64 bytes themselves are the compiler's to split.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static inline __m512 emulated_load(unsigned mask, const float* p) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = mask >> i & 1 ? p[i] : 0.0f;  // a lane that is masked out is not read
  __m512 v;
  memcpy(&v, lanes, sizeof v);
  return v;
}

static inline void emulated_store(float* p, unsigned mask, __m512 v) {
  float lanes[16];
  memcpy(lanes, &v, sizeof v);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) p[i] = lanes[i];
  }
}

static inline void emulated_stream(float* p, __m512 v) {
  if (uintptr_t(p) % 64 != 0) {
    fprintf(stderr, "a 64-byte streaming store to %p, which is not aligned, would have faulted\n", (void*)p);
    abort();
  }
  memcpy(p, &v, sizeof v);
}

static inline __m512 emulated_from_half(__m256i v) {
  uint16_t bits[16];
  memcpy(bits, &v, sizeof v);
  __m512 out;
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = _cvtsh_ss(bits[i]);
  memcpy(&out, lanes, sizeof out);
  return out;
}

static inline __m256i emulated_to_half(__m512 v) {
  float lanes[16];
  uint16_t bits[16];
  memcpy(lanes, &v, sizeof v);
  for (int i = 0; i < 16; ++i) bits[i] = _cvtss_sh(lanes[i], _MM_FROUND_TO_NEAREST_INT);
  __m256i out;
  memcpy(&out, bits, sizeof out);
  return out;
}

// With an error as large as the instruction may have.
static inline __m512 emulated_inverse_root(__m512 v) {
  float lanes[16];
  memcpy(lanes, &v, sizeof v);
  for (int i = 0; i < 16; ++i) lanes[i] = 1.0f / sqrtf(lanes[i]) * (i % 2 ? 1 + 0x1p-14f : 1 - 0x1p-14f);
  memcpy(&v, lanes, sizeof v);
  return v;
}

static inline int emulated_any(__m512i v) {
  int32_t lanes[16], all = 0;
  memcpy(lanes, &v, sizeof v);
  for (int i = 0; i < 16; ++i) all |= lanes[i];
  return all != 0;
}

#undef _mm512_maskz_cvtps_ph  // a macro without optimisation
#define _mm512_maskz_loadu_ps(mask, p) emulated_load(mask, p)
#define _mm512_mask_storeu_ps(p, mask, v) emulated_store(p, mask, v)
#define _mm512_stream_ps(p, v) emulated_stream(p, v)
#define _mm512_maskz_cvtph_ps(mask, v) emulated_from_half(v)
#define _mm512_maskz_cvtps_ph(mask, v, rounding) emulated_to_half(v)
#define _mm512_maskz_rsqrt14_ps(mask, v) emulated_inverse_root(v)
#define _mm512_test_epi32_mask(a, b) emulated_any(a)
