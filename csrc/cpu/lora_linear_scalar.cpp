#include "lora_kernels.h"

namespace rankernel::scalar {
namespace {
#include "simd/scalar.h"
#include "simd/panels.h"
#include "lora_linear_kernel.h"
}  // namespace

LoraKernels lora_kernels(DType dtype, DType factor_dtype) { return float_kernels(dtype, factor_dtype); }

}  // namespace rankernel::scalar
