// What relevance_feedback.cpp (baseline code) and its kernels of one instruction set agree on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../relevance_feedback.h"

namespace rankernel {

struct FeedbackTask {
  float* query;           // [size], updated in place
  const void* documents;  // the first one of this query
  const int64_t* order;   // [num_documents] the valid ones, the teacher's scores falling
  const float* teacher;   // [num_documents] in that order
  int64_t num_documents;  // at least 2
};

struct FeedbackKernels {
  size_t (*scratch_bytes)(const RelevanceFeedbackArgs&);  // of one thread
  void (*run)(const RelevanceFeedbackArgs&, const FeedbackTask&, void* scratch);
};

#define RANKERNEL_DECLARE_ISA(isa)               \
  namespace isa {                                \
  FeedbackKernels feedback_kernels(DType dtype); \
  }
RANKERNEL_DECLARE_ISA(scalar)
RANKERNEL_DECLARE_ISA(avx2)
RANKERNEL_DECLARE_ISA(avx512)
#undef RANKERNEL_DECLARE_ISA

}  // namespace rankernel
