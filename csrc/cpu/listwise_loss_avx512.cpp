#include <immintrin.h>

#include "listwise_kernels.h"

namespace rankernel::avx512 {
namespace {
#include "simd/avx512.h"
#include "simd/math.h"
#include "listwise_loss_kernel.h"
}  // namespace

ListwiseKernels listwise_kernels() { return kernels(); }

}  // namespace rankernel::avx512
