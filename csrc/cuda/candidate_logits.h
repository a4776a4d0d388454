// candidate_logits on a CUDA device, for CandidateLogitsArgs whose arrays are on it. Every kernel is launched on one
// stream, and nothing is allocated or waited for, so that calls can be captured in a CUDA graph.
#pragma once

#include "../candidate_logits.h"

namespace rankernel::cuda {

// Bytes that candidate_logits() needs besides its arguments.
size_t candidate_logits_workspace(int64_t num_rows, int64_t vocabulary, bool log_probs);

// On the current device. `workspace` is aligned to 16 bytes and holds anything. Candidates out of range give NaN.
// Returns the cudaError_t of the launches; num_threads is not used.
int candidate_logits(const CandidateLogitsArgs& args, void* workspace, void* stream);

}  // namespace rankernel::cuda
