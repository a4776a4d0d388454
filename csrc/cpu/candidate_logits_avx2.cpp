#include <immintrin.h>

#include "candidate_kernels.h"

namespace rankernel::avx2 {
namespace {
#include "simd/avx2.h"
#include "simd/math.h"
#include "candidate_logits_kernel.h"
}  // namespace

CandidateKernels candidate_kernels(DType dtype) {
  if (dtype == DType::kBFloat16) return kernels_of<FloatDot, float, BFloat16>();
  if (dtype == DType::kFloat16) return kernels_of<FloatDot, float, Float16>();
  return kernels_of<FloatDot, float, float>();
}

}  // namespace rankernel::avx2
