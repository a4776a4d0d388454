// Logits of a few vocabulary entries: z_bv = softcap * tanh(scale * (h_b . W_v + bias_v) / softcap), accumulated in
// float32. With lse, log-probabilities: z minus the log-sum-exp over the whole vocabulary, which streams W once.
#pragma once

#include "types.h"

namespace rankernel {

struct CandidateLogitsArgs {
  DType dtype;
  const void* hidden;  // [num_rows, hidden_size]; strides count elements, the last dimension is contiguous
  int64_t hidden_stride;
  const void* weight;  // [vocabulary, hidden_size]
  int64_t weight_stride;
  const int64_t* candidates;  // [num_candidates], or [num_rows, num_candidates]
  int64_t candidates_stride;  // 0: the same for every row
  const void* bias;           // [vocabulary], or null
  int64_t num_rows, vocabulary, hidden_size, num_candidates;
  float scale;
  float softcap;  // 0: none
  float* out;     // [num_rows, num_candidates]
  float* lse;     // [num_rows], or null for logits
  int num_threads;
};

Status candidate_logits(const CandidateLogitsArgs& args, int isa);

}  // namespace rankernel
