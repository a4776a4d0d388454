#include <immintrin.h>

#include "lora_kernels.h"

// All products on tiles: with float32 adapters in three parts, still faster than float32 multiply-adds. Compiled once
// for the hardware and, for tests elsewhere, once with software tiles.
#ifdef RANKERNEL_AMX_SOFTWARE
namespace rankernel::amx_emulated {
#else
namespace rankernel::amx {
#endif
namespace {
#include "simd/avx512.h"
#include "simd/panels.h"
#include "simd/bf16_pairs.h"
#include "simd/amx_tiles.h"
#include "simd/amx_panels.h"
#include "lora_linear_kernel.h"
#include "lora_linear_pairs.h"

// The tile configuration belongs to the thread: it lasts for one task.
template <class Kernel>
struct OnTiles {
  static void shrink(const LoraShrinkArgs& args, const LoraGroup& group, int64_t begin, int64_t end, float* partial,
                     void* scratch) {
    RK_TILES_BEGIN();
    Kernel::shrink(args, group, begin, end, partial, scratch);
    RK_TILES_END();
  }
  static void gradients(const LoraShrinkArgs& args, const LoraGroup& group, int64_t column, void* scratch) {
    RK_TILES_BEGIN();
    Kernel::gradients(args, group, column, scratch);
    RK_TILES_END();
  }
  static void expand(const LoraExpandArgs& args, const LoraGroup& group, int64_t begin, int64_t end, int64_t column,
                     int64_t column_end, void* scratch) {
    RK_TILES_BEGIN();
    Kernel::expand(args, group, begin, end, column, column_end, scratch);
    RK_TILES_END();
  }
  static LoraKernels kernels() {
    LoraKernels kernels = Kernel::kernels();
    kernels.shrink = shrink;
    kernels.gradients = gradients;
    kernels.expand = expand;
    return kernels;
  }
};
}  // namespace

LoraKernels lora_kernels(DType, DType factor_dtype) {
  if (factor_dtype == DType::kFloat32)
    return OnTiles<LoraLinear<PairOperands<AmxPanels, 3>, BFloat16, float>>::kernels();
  return OnTiles<LoraLinear<PairOperands<AmxPanels, 1>, BFloat16, BFloat16>>::kernels();
}

}  // namespace
