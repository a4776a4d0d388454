#include <immintrin.h>

#include "attention_kernels.h"

// Compiled once for the hardware and, for tests elsewhere, once with software tiles.
#ifdef RANKERNEL_AMX_SOFTWARE
namespace rankernel::amx_emulated {
#else
namespace rankernel::amx {
#endif
namespace {
#include "simd/avx512.h"
#include "simd/tile.h"
#include "simd/bf16_pairs.h"
#include "simd/amx_tiles.h"
#include "simd/amx_panels.h"
#include "block_attention_backward_kernel.h"
#include "block_attention_kernel.h"

using Kernel = BlockAttention<AmxPanels, BFloat16>;
using BackwardKernel = BlockAttentionBackward<AmxPanels, BFloat16>;

// The tile configuration belongs to the thread: it lasts for one task.
void run_task(const BlockAttentionArgs& args, const AttentionTask& task, int64_t kv_head, int64_t max_keys,
              void* scratch) {
  RK_TILES_BEGIN();
  Kernel::run_task(args, task, kv_head, max_keys, scratch);
  RK_TILES_END();
}

void run_tail(const BlockAttentionArgs& args, const TailTask& task, int64_t kv_head, int64_t max_keys, void* scratch) {
  RK_TILES_BEGIN();
  Kernel::run_tail(args, task, kv_head, max_keys, scratch);
  RK_TILES_END();
}

void run_documents(const BlockAttentionBackwardArgs& args, const GradientTask& task, const GradientLimits& limits,
                   const float* delta, int64_t kv_head, void* scratch) {
  RK_TILES_BEGIN();
  BackwardKernel::run_documents(args, task, limits, delta, kv_head, scratch);
  RK_TILES_END();
}

void run_ends(const BlockAttentionBackwardArgs& args, const GradientTask& task, const GradientLimits& limits,
              const float* delta, int64_t kv_head, void* scratch) {
  RK_TILES_BEGIN();
  BackwardKernel::run_ends(args, task, limits, delta, kv_head, scratch);
  RK_TILES_END();
}
}  // namespace

AttentionKernels attention_kernels(DType) {
  AttentionKernels kernels = Kernel::kernels();
  kernels.run_task = run_task;
  kernels.run_tail = run_tail;
  kernels.run_documents = run_documents;
  kernels.run_ends = run_ends;
  return kernels;
}

}  // namespace
