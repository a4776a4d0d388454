// Block-sparse in-context-ranking attention over a packed row of lists:
//   out[i] = sum_j softmax_j(softcap(scale * q_i . k_j)) v_j   over the keys j that row i sees,
// where a document sees its list's prefix and itself causally, and prefix and tail see everything before them in the
// list. Grouped-query heads; float32 accumulation and softmax.
#pragma once

#include <cstddef>

#include "types.h"

namespace rankernel {

struct BlockAttentionArgs {
  DType dtype;
  TokenHeads query, key, value, out;
  float* lse;          // [num_tokens, num_query_heads], natural log of the softmax denominator, sinks included
  const float* sinks;  // [num_query_heads], one extra logit per head, or null
  Layout layout;
  int64_t num_query_heads, num_kv_heads, head_size;
  float scale;
  float softcap;   // 0: none
  int64_t window;  // key j is seen by row i only if i - j < window; 0: none
  int num_threads;
};

struct BlockAttentionBackwardArgs {
  BlockAttentionArgs forward;  // out and lse are read
  TokenHeads grad_out;
  const float* grad_lse;                        // [num_tokens, num_query_heads]
  TokenHeads grad_query, grad_key, grad_value;  // written
  float* grad_sinks;                            // [num_query_heads], written where there are sinks
};

// isa: index into isa_names() of the best instruction set to use. Throws std::bad_alloc.
Status block_attention(const BlockAttentionArgs& args, int isa);
Status block_attention_backward(const BlockAttentionBackwardArgs& args, int isa);

}  // namespace rankernel
