// Vectors of one float: the portable baseline, and the plainest statement of what the other headers provide.
#include "element.h"

using Vec = float;
constexpr int kWidth = 1;
constexpr int kRows = 4, kVectors = 4;  // registers of one matrix product: kRows x kVectors accumulators

inline Vec zero() { return 0.0f; }
inline Vec set1(float x) { return x; }
template <class T>
inline Vec load(const T* p) {
  return to_float(*p);
}
template <class T>
inline Vec load_partial(const T* p, int n) {
  return n > 0 ? to_float(*p) : 0.0f;
}
template <class T>
inline void store(T* p, Vec x) {
  assign(*p, x);
}
template <class T>
inline void store_partial(T* p, Vec x, int n) {
  if (n > 0) assign(*p, x);
}
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fmadd(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec sqrt(Vec a) { return __builtin_sqrtf(a); }
inline Vec abs(Vec a) { return __builtin_fabsf(a); }
inline Vec copy_sign(Vec magnitude, Vec sign) { return __builtin_copysignf(magnitude, sign); }
inline Vec select_less(Vec a, Vec b, Vec if_less, Vec otherwise) { return a < b ? if_less : otherwise; }
inline float reduce_max(Vec a) { return a; }
inline float reduce_add(Vec a) { return a; }
inline Vec reduce_add(const Vec (&r)[kWidth]) { return r[0]; }

// Lanes [begin, end) of x, `fill` in the others; begin and end may lie outside the vector.
inline Vec keep(Vec x, int begin, int end, Vec fill) { return begin <= 0 && end >= 1 ? x : fill; }

// x rounded to an integer, and p * 2^n for such an n in [-150, 127] or NaN.
inline Vec round(Vec x) { return __builtin_rintf(x); }
inline Vec scale_by_power(Vec p, Vec n) {
  if (!(n >= -126.0f)) return n != n ? n : 0.0f;
  return p * from_bits(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23);
}

// k with x = m 2^k and m in [0.75, 1.5), for positive normal x.
inline Vec exponent(Vec x) { return static_cast<float>(static_cast<int32_t>(to_bits(x) - 0x3f400000u) >> 23); }

// table[index], the index an integer in a float.
inline Vec gather(const float* table, Vec index) { return table[static_cast<int>(index)]; }

// 64-bit lanes, and products of their low halves.
using Lanes64 = uint64_t;
inline Lanes64 multiply_halves(Lanes64 a, Lanes64 b) { return (a & 0xffffffff) * (b & 0xffffffff); }

inline void transpose(Vec (&)[kWidth]) {}
