// Operands of lora_linear_kernel.h for products that take pairs of bfloat16.

// Three parts hold the 24 bits of a float32 factor or coefficient; those of bfloat16 are one, and the coefficients are
// rounded as eager rounds them.
template <class Panels, int kNumParts>
struct PairOperands : Panels {
  static constexpr int kParts = kNumParts;
  static constexpr bool kOneTile = false;
  static constexpr int kSlab = kLoraColumns;

  static void store_depths(BFloat16* to, const Vec (&depths)[2]) {
    const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(depths[1], depths[0]);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(interleaved, both));
  }
};
