// One choice per op: the best kernel for a dtype among the instruction sets allowed. The tables in dispatch.cpp are the
// only place that a new instruction set has to be named.
#pragma once

#include "attention_kernels.h"
#include "candidate_kernels.h"
#include "feedback_kernels.h"
#include "listwise_kernels.h"
#include "lora_kernels.h"

namespace rankernel {

struct KernelTable {
  const char* op;
  bool has[kNumIsas][3];  // [isa][dtype]
};

extern const KernelTable kKernelTables[];
extern const int kNumKernelTables;

// Best instruction set of at most `isa` that has a kernel of `table` for `dtype`. `isa` itself must be runnable.
int select_isa(const KernelTable& table, DType dtype, int isa);

AttentionKernels select_attention_kernels(DType dtype, int isa);
ScoreKernels select_score_kernels(DType dtype, int isa);
ListwiseKernels select_listwise_kernels(DType dtype, int isa);
FeedbackKernels select_feedback_kernels(DType dtype, int isa);
CandidateKernels select_candidate_kernels(DType dtype, int isa);
LoraKernels select_lora_kernels(DType dtype, DType factor_dtype, int isa);

}  // namespace rankernel
