// listwise_loss on a CUDA device, for ListwiseArgs whose arrays are on it. Every kernel is launched on one stream, and
// nothing is allocated or waited for, so that calls can be captured in a CUDA graph.
#pragma once

#include "../listwise_loss.h"

namespace rankernel::cuda {

// Whether `kind` has kernels: all but neural_ndcg and groco.
bool covers(ListwiseKind kind);

// Bytes that listwise_loss() needs besides its arguments; depends on the sizes, the kind and settings.count.
size_t listwise_loss_workspace(const ListwiseArgs& args);

// Of a covered kind, on the current device. `workspace` is aligned to 16 bytes and holds anything. Offsets that fall or
// leave the items cannot be reported: nothing outside the arrays is touched, and the loss is that of some other lists.
// Returns the cudaError_t of the launches; num_threads is not used.
int listwise_loss(const ListwiseArgs& args, void* workspace, void* stream);

}  // namespace rankernel::cuda
