#include <immintrin.h>

#include "attention_kernels.h"

namespace rankernel::avx512bf16 {
namespace {
#include "simd/avx512.h"
#include "simd/tile.h"
#include "simd/bf16_pairs.h"
#include "simd/dot_panels.h"
#include "block_attention_backward_kernel.h"
#include "block_attention_kernel.h"
}  // namespace

AttentionKernels attention_kernels(DType) { return BlockAttention<DotPanels, BFloat16>::kernels(); }

}  // namespace rankernel::avx512bf16
