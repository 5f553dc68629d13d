# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Vectors in C: as wide as the CPU has them, by the extensions that GCC and Clang share."""

VECTORS = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define KEYS 4
#elif defined(__AVX2__)
#define LANES 8
#define KEYS 2
#else
#define LANES 4
#define KEYS 4
#endif
#if defined(__AVX512BF16__)
#define TAKES_BFLOAT16 1
#else
#define TAKES_BFLOAT16 0
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))

INLINE Floats all(float number) { return (Floats){0} + number; }

/* The second one where one is no number. */
INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  const Integers is_larger = a > b;
  return (Floats)(((Integers)a & is_larger) | ((Integers)b & ~is_larger));
#endif
}

/* 2^x of numbers of at most 0, to 1e-7: a polynomial of what is left of the nearest integer. */
INLINE Floats power_of_two(Floats x) {
  x = larger(all(-126.0f), x);
  const Floats shifted = x + 12582912.0f; /* 1.5 * 2^23: the integer is in the last bits */
  const Floats rest = x - (shifted - 12582912.0f);
  Floats power = rest * 1.5403530e-4f + 1.3333558e-3f;
  power = power * rest + 9.6181291e-3f;
  power = power * rest + 5.5504109e-2f;
  power = power * rest + 2.4022651e-1f;
  power = power * rest + 6.9314718e-1f;
  power = power * rest + 1.0f;
  return (Floats)((Integers)power + ((Integers)shifted << 23));
}

INLINE uint32_t pair_at(const char *place) {
  uint32_t pair;
  memcpy(&pair, place, 4);
  return pair;
}

/* The sums and the products with one number, or with a pair of bfloat16 and the sum of two products. */
INLINE Floats multiply_add(Floats sums, Floats numbers, uint32_t factor, int is_bfloat16) {
#if defined(__AVX512BF16__)
  if (is_bfloat16)
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)numbers, (__m512bh)_mm512_set1_epi32(factor));
#else
  (void)is_bfloat16;
#endif
  float number;
  memcpy(&number, &factor, 4);
  return sums + numbers * number;
}

/* Pairs of bfloat16: of each number of the first, in the lower half, and of the second. */
INLINE Floats rounded_pairs(Floats first, Floats second) {
#if defined(__AVX512BF16__)
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
  return (Floats)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
  return first + second * 0.0f; /* never called */
#endif
}

INLINE uint16_t to_bfloat16(float number) {
  uint32_t bits;
  memcpy(&bits, &number, 4);
  if (number != number) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
"""
