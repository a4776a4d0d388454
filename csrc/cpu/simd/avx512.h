// Sixteen-lane vectors: AVX-512 F, BW, DQ, VL.
#include "element.h"

using Vec = __m512;
constexpr int kWidth = 16;
constexpr int kRows = 14, kVectors = 2;  // 28 accumulators, 2 operands and 1 broadcast of 32 registers

inline __mmask16 first_lanes(int n) {
  return static_cast<__mmask16>(n >= kWidth ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u);
}

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec widen(__m256i half, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Vec widen(__m256i half, Float16) { return _mm512_cvtph_ps(half); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
template <class T>
inline Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
inline Vec load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
template <class T>
inline Vec load_partial(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), T{});
}
inline __m256i narrow(Vec x, BFloat16) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
inline __m256i narrow(Vec x, Float16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
template <class T>
inline void store(T* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T{}));
}
inline void store_partial(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
template <class T>
inline void store_partial(T* p, Vec x, int n) {
  if (n >= kWidth) return store(p, x);
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(x, T{}));
}
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
inline Vec copy_sign(Vec magnitude, Vec sign) {
  return _mm512_or_ps(magnitude, _mm512_and_ps(_mm512_set1_ps(-0.0f), sign));
}
inline Vec select_less(Vec a, Vec b, Vec if_less, Vec otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, if_less);
}
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }

// Lane 4q + p is reduce_add(r[4p + q]), bit by bit: halves are added to halves, as many vectors at a time as fit in
// one.
inline Vec reduce_add(const Vec (&r)[kWidth]) {
  Vec t[8], u[4], v[2];
  for (int i = 0; i < 8; ++i)
    t[i] = add(_mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0x44), _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0xee));
  for (int i = 0; i < 4; ++i)
    u[i] = add(_mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x88), _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xdd));
  for (int i = 0; i < 2; ++i)
    v[i] = add(_mm512_shuffle_ps(u[2 * i], u[2 * i + 1], 0x44), _mm512_shuffle_ps(u[2 * i], u[2 * i + 1], 0xee));
  return add(_mm512_shuffle_ps(v[0], v[1], 0x88), _mm512_shuffle_ps(v[0], v[1], 0xdd));
}

// Lanes [begin, end) of x, `fill` in the others; begin and end may lie outside the vector.
inline Vec keep(Vec x, int begin, int end, Vec fill) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(first_lanes(end) & ~first_lanes(begin)), fill, x);
}

// x rounded to an integer, and p * 2^n for such an n in [-150, 127] or NaN.
inline Vec round(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale_by_power(Vec p, Vec n) { return _mm512_scalef_ps(p, n); }

// k with x = m 2^k and m in [0.75, 1.5), for positive normal x.
inline Vec exponent(Vec x) {
  const __m512i above = _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x3f400000));
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(above, 23));
}

// table[index], the index an integer in a float.
inline Vec gather(const float* table, Vec index) { return _mm512_i32gather_ps(_mm512_cvtps_epi32(index), table, 4); }

// 64-bit lanes, and products of their low halves.
using Lanes64 = __m512i;
inline Lanes64 multiply_halves(Lanes64 a, Lanes64 b) { return _mm512_mul_epu32(a, b); }

inline void transpose(Vec (&r)[kWidth]) {
  Vec t[kWidth];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  // r[4g + j] lane block b holds column 4b + j of rows 4g .. 4g + 3: transpose the 4 x 4 grid of 128-bit blocks.
  for (int j = 0; j < 4; ++j) {
    const Vec a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x44), b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x44);
    const Vec c = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xee), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xee);
    t[j] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[8 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
  for (int i = 0; i < kWidth; ++i) r[i] = t[i];
}
