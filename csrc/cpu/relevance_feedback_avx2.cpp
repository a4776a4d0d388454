#include <immintrin.h>

#include "feedback_kernels.h"

namespace rankernel::avx2 {
namespace {
#include "simd/avx2.h"
#include "simd/tile.h"
#include "relevance_feedback_kernel.h"
}  // namespace

FeedbackKernels feedback_kernels(DType dtype) {
  if (dtype == DType::kBFloat16) return RelevanceFeedback<BFloat16>::kernels();
  if (dtype == DType::kFloat16) return RelevanceFeedback<Float16>::kernels();
  return RelevanceFeedback<float>::kernels();
}

}  // namespace rankernel::avx2
