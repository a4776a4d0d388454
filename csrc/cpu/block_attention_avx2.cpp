#include <immintrin.h>

#include "attention_kernels.h"

namespace rankernel::avx2 {
namespace {
#include "simd/avx2.h"
#include "simd/tile.h"
#include "block_attention_backward_kernel.h"
#include "block_attention_kernel.h"
}  // namespace

AttentionKernels attention_kernels(DType dtype) {
  if (dtype == DType::kBFloat16) return BlockAttention<FloatPanels, BFloat16>::kernels();
  if (dtype == DType::kFloat16) return BlockAttention<FloatPanels, Float16>::kernels();
  return BlockAttention<FloatPanels, float>::kernels();
}

}  // namespace rankernel::avx2
