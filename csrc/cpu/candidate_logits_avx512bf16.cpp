#include <immintrin.h>

#include "candidate_kernels.h"

// VDPBF16PS multiplies pairs of bfloat16 as they lie in memory and adds both products to a float32 lane.
namespace rankernel::avx512bf16 {
namespace {
#include "simd/avx512.h"
#include "simd/math.h"
#include "simd/panels.h"
#include "simd/bf16_pairs.h"
#include "candidate_logits_kernel.h"

struct PairDot {
  using Operand = __m512bh;
  static constexpr int64_t kStep = 2 * kWidth;
  static Operand load_whole(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Operand load_up_to(const BFloat16* p, int64_t left) { return (__m512bh)Bf16Pairs::load_units(p, left); }
  static Vec multiply_add(Operand a, Operand b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
};
}  // namespace

CandidateKernels candidate_kernels(DType) { return kernels_of<PairDot, BFloat16, BFloat16>(); }

}  // namespace rankernel::avx512bf16
