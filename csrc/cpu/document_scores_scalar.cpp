#include "attention_kernels.h"

namespace rankernel::scalar {
namespace {
#include "simd/scalar.h"
#include "simd/tile.h"
#include "document_scores_kernel.h"
}  // namespace

ScoreKernels score_kernels(DType dtype) {
  if (dtype == DType::kBFloat16) return DocumentScores<BFloat16>::kernels();
  if (dtype == DType::kFloat16) return DocumentScores<Float16>::kernels();
  return DocumentScores<float>::kernels();
}

}  // namespace rankernel::scalar
