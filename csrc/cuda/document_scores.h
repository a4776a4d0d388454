// document_logsumexp and token_attention_mass on a CUDA device, for arguments whose arrays are on it. Every kernel is
// launched on one stream, and nothing is allocated or waited for, so that calls can be captured in a CUDA graph.
#pragma once

#include "../document_scores.h"

namespace rankernel::cuda {

enum class DocumentScoresOp : int { kLogSumExp = 0, kMass = 1, kLogSumExpBackward = 2, kMassBackward = 3 };

// Bytes that an op needs besides its arguments; depends on the numbers of rows, tokens and segments and on the heads.
size_t document_scores_workspace(DocumentScoresOp op, const DocumentScoresArgs& args);

// On the current device, for head sizes from 1 to 256. `workspace` is aligned to 16 bytes and holds anything. What the
// CPU reports as an error cannot be reported here, but nothing is read or written out of bounds: rows in no list give
// NaN in document_logsumexp and take no part in anything else, tokens of no list get no mass and no gradient, and a
// layout whose boundaries fall or leave the tokens gives undefined results. Returns the cudaError_t of the launches;
// num_threads is not used.
int document_logsumexp(const DocumentScoresArgs& args, void* workspace, void* stream);
int token_attention_mass(const DocumentScoresArgs& args, void* workspace, void* stream);
int document_logsumexp_backward(const DocumentScoresBackwardArgs& args, void* workspace, void* stream);
int token_attention_mass_backward(const DocumentScoresBackwardArgs& args, void* workspace, void* stream);

}  // namespace rankernel::cuda
