// What the bfloat16 panels of AVX512_BF16 and AMX share: elements travel in pairs, one 32-bit unit each.
struct Bf16Pairs {
  using Element = BFloat16;
  static constexpr int kPair = 2;
  static constexpr int kExpDegree = 4;  // probabilities are rounded to bfloat16

  // kWidth pairs as raw bits, zero beyond `left` elements.
  static Vec load_units(const BFloat16* p, int64_t left) {
    const uint32_t mask = left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1u;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
  }

  // Two rows of values interleaved, elements [element, element + kColumns); zeros for a null row.
  static void store_values(BFloat16* to, const BFloat16* const (&rows)[2], int64_t element, int64_t left) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    static_assert(kColumns == 32, "a row of values is one register");
    const __m512i a = _mm512_castps_si512(rows[0] ? load_units(rows[0] + element, left) : zero());
    const __m512i b = _mm512_castps_si512(rows[1] ? load_units(rows[1] + element, left) : zero());
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, high, b));
  }
};
