#include <immintrin.h>

#include "lora_kernels.h"

namespace rankernel::avx512 {
namespace {
#include "simd/avx512.h"
#include "simd/panels.h"
#include "lora_linear_kernel.h"
}  // namespace

LoraKernels lora_kernels(DType dtype, DType factor_dtype) { return float_kernels(dtype, factor_dtype); }

}  // namespace rankernel::avx512
