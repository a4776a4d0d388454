// What candidate_logits.cpp (baseline code) and its kernels of one instruction set agree on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../candidate_logits.h"

namespace rankernel {

// Weight rows and hidden rows that are multiplied together. The weights of a block stay in L2 for all hidden rows.
constexpr int64_t kWeightBlock = 64, kHiddenBlock = 32;

// sum * e^maximum, a part of the sum of e^z over the vocabulary.
struct PartialSum {
  float maximum, sum;
};

struct CandidateKernels {
  // Logits of the candidates [begin, begin + count) of the hidden rows [row, row + rows), at most one block of each.
  void (*score)(const CandidateLogitsArgs&, int64_t row, int64_t rows, int64_t begin, int64_t count);
  // The hidden states as `reduce` wants them, computed once per call.
  size_t (*prepared_bytes)(const CandidateLogitsArgs&);
  void (*prepare)(const CandidateLogitsArgs&, void* prepared);
  // sums[num_rows] over the vocabulary [begin, end).
  void (*reduce)(const CandidateLogitsArgs&, const void* prepared, int64_t begin, int64_t end, PartialSum* sums);
};

#define RANKERNEL_DECLARE_ISA(isa)                 \
  namespace isa {                                  \
  CandidateKernels candidate_kernels(DType dtype); \
  }
RANKERNEL_DECLARE_ISA(scalar)
RANKERNEL_DECLARE_ISA(avx2)
RANKERNEL_DECLARE_ISA(avx512)
RANKERNEL_DECLARE_ISA(avx512bf16)
RANKERNEL_DECLARE_ISA(amx)
RANKERNEL_DECLARE_ISA(amx_emulated)
#undef RANKERNEL_DECLARE_ISA

}  // namespace rankernel
