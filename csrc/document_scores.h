// What a few query rows attend to, without the attention matrix:
//   document_logsumexp:    out[r, h, d] = log sum_{j in document d, visible} exp(softcap(scale * q_rh . k_j))
//   token_attention_mass:  out[j] = sum_h mean_{rows r of j's list} softmax_j(softcap(scale * q_rh . k_j))
// and the gradients for q and k of a loss whose gradient for out is given.
#pragma once

#include "types.h"

namespace rankernel {

struct DocumentScoresArgs {
  DType dtype;
  TokenHeads query;     // [num_rows, num_query_heads, head_size]
  TokenHeads key;       // [num_tokens, num_kv_heads, head_size]
  const int64_t* rows;  // [num_rows], packed position of every query row
  int64_t num_rows;
  float* out;  // document_logsumexp: [num_rows, num_query_heads, max_documents]; token_attention_mass: [num_tokens].
               // Read by document_logsumexp_backward, not used by token_attention_mass_backward.
  int64_t max_documents;
  Layout layout;
  int64_t num_query_heads, num_kv_heads, head_size;
  float scale;
  float softcap;  // 0: none
  int num_threads;
};

struct DocumentScoresBackwardArgs {
  DocumentScoresArgs forward;
  const float* grad_out;  // as forward.out
  float* grad_query;      // [num_rows, num_query_heads, head_size]
  void* grad_key;         // [num_tokens, num_kv_heads, head_size] of forward.dtype
};

Status document_logsumexp(const DocumentScoresArgs& args, int isa);
Status token_attention_mass(const DocumentScoresArgs& args, int isa);
// Where the log-sum-exp is -inf or its gradient 0, nothing flows back, whatever the other of the two is.
Status document_logsumexp_backward(const DocumentScoresBackwardArgs& args, int isa);
Status token_attention_mass_backward(const DocumentScoresBackwardArgs& args, int isa);

}  // namespace rankernel
