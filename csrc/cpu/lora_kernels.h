// What lora_linear.cpp (baseline code) and its kernels of one instruction set agree on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../lora_linear.h"

namespace rankernel {

// Rows and columns of x or out that are worked on together. Tasks begin at multiples.
constexpr int64_t kLoraRows = 32, kLoraColumns = 128;

// Rows whose gradients are summed on their own first: of two short sums less is lost than of a long one.
constexpr int64_t kLoraChunk = 128;

// Rows that use the same factors.
struct LoraGroup {
  const LoraFactor* factors;
  int64_t num_factors;
  int64_t rank;         // of all factors together
  const int64_t* rows;  // null: all rows
  int64_t num_rows;
  void* packed;  // the factors as the kernels want them
};

struct LoraKernels {
  size_t (*packed_bytes)(int64_t rank, int64_t size);
  size_t (*partial_bytes)(int64_t rank, int64_t size);
  size_t (*scratch_bytes)(int64_t rank);
  // Packs columns [column, column + kLoraColumns) of a group's factors.
  void (*pack_shrink)(const LoraGroup&, int64_t size, int64_t column, void* scratch);
  void (*pack_expand)(const LoraGroup&, int64_t size, int64_t column, void* scratch);
  // Sums of the rows [begin, end) of a group and, unless `partial` is null, what they add to the gradients.
  void (*shrink)(const LoraShrinkArgs&, const LoraGroup&, int64_t begin, int64_t end, float* partial, void* scratch);
  // Columns [column, column + kLoraColumns) of a group's gradients: from `count` partial ones that follow each other,
  void (*add_partials)(const LoraShrinkArgs&, const LoraGroup&, const float* partials, int64_t count, int64_t column);
  // or from x.
  void (*gradients)(const LoraShrinkArgs&, const LoraGroup&, int64_t column, void* scratch);
  // Columns [column, column_end) of the rows [begin, end) of a group.
  void (*expand)(const LoraExpandArgs&, const LoraGroup&, int64_t begin, int64_t end, int64_t column,
                 int64_t column_end, void* scratch);
};

#define RANKERNEL_DECLARE_ISA(isa)                           \
  namespace isa {                                            \
  LoraKernels lora_kernels(DType dtype, DType factor_dtype); \
  }
RANKERNEL_DECLARE_ISA(scalar)
RANKERNEL_DECLARE_ISA(avx2)
RANKERNEL_DECLARE_ISA(avx512)
RANKERNEL_DECLARE_ISA(avx512bf16)
RANKERNEL_DECLARE_ISA(amx)
RANKERNEL_DECLARE_ISA(amx_emulated)
#undef RANKERNEL_DECLARE_ISA

}  // namespace rankernel
