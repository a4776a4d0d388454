#include "listwise_kernels.h"

namespace rankernel::scalar {
namespace {
#include "simd/scalar.h"
#include "simd/math.h"
#include "listwise_loss_kernel.h"
}  // namespace

ListwiseKernels listwise_kernels() { return kernels(); }

}  // namespace rankernel::scalar
