// lora_linear on a CUDA device, for arguments whose arrays are on it; only the list of factors itself is the host's.
// Every kernel is launched on one stream, and nothing is allocated or waited for, so that calls can be captured in a
// CUDA graph.
#pragma once

#include "../lora_linear.h"

namespace rankernel::cuda {

// On the current device. The seed of dropout is one int64 on it, which is read only with a threshold. Segments that are
// not as LoraSegments says give undefined results, but nothing is read or written out of bounds. Returns the
// cudaError_t of the launches; dropout.seed and num_threads are not used. Out is rounded once for every 48 factors that
// a row has.
int lora_shrink(const LoraShrinkArgs& args, const int64_t* seed, void* stream);
int lora_expand(const LoraExpandArgs& args, const int64_t* seed, void* stream);

}  // namespace rankernel::cuda
