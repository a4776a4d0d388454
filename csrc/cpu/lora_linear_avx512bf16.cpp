#include <immintrin.h>

#include "lora_kernels.h"

// Products of bfloat16 with bfloat16 adapters; in float32 with float32 adapters, whose three parts would take longer.
namespace rankernel::avx512bf16 {
namespace {
#include "simd/avx512.h"
#include "simd/panels.h"
#include "simd/bf16_pairs.h"
#include "simd/dot_panels.h"
#include "lora_linear_kernel.h"
#include "lora_linear_pairs.h"
}  // namespace

LoraKernels lora_kernels(DType dtype, DType factor_dtype) {
  if (factor_dtype == DType::kFloat32) return float_kernels(dtype, factor_dtype);
  return LoraLinear<PairOperands<DotPanels, 1>, BFloat16, BFloat16>::kernels();
}

}  // namespace rankernel::avx512bf16
