#include <immintrin.h>

#include "listwise_kernels.h"

namespace rankernel::avx2 {
namespace {
#include "simd/avx2.h"
#include "simd/math.h"
#include "listwise_loss_kernel.h"
}  // namespace

ListwiseKernels listwise_kernels() { return kernels(); }

}  // namespace rankernel::avx2
