// What the drivers (block_attention.cpp, document_scores.cpp; baseline code) and the kernels of one instruction set
// agree on: plain structs, no standard containers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../block_attention.h"
#include "../document_scores.h"
#include "cpu_features.h"

namespace rankernel {

// Query rows [row_begin, row_end) of one segment. They see the tokens [prefix_begin, prefix_end) and their segment,
// which starts at own_begin, causally.
struct RowSpan {
  int64_t prefix_begin, prefix_end;
  int64_t own_begin;
  int64_t row_begin, row_end;
};

// Softmax state of query rows that is carried between calls: row maximum m and sum l of exponentials (base 2, after the
// scale) and the weighted sum of values. Laid out as m[rows], l[rows], acc[rows][columns]; rows are
// (token - tail_begin) * group + head, padded to the kernel's row multiple.
struct PartialShape {
  int64_t rows, columns;
  int64_t size() const { return rows * (2 + columns); }
};

// Spans that one task packs and computes for one KV head. Where tail_end > tail_begin the task also accumulates, into
// its own slot, what the tail sees of the keys [row_begin, row_end) of every span.
struct AttentionTask {
  const RowSpan* spans;
  int64_t num_spans;
  int64_t tail_begin, tail_end;
  float* slots;  // num_kv_heads states, or null
  PartialShape slot;
};

// Rows of a tail, which see the prefix and the tail like a document; then the slots of all tasks of the list are
// merged in order.
struct TailTask {
  RowSpan span;
  int64_t tail_begin;
  const float* slots;  // [num_slots][num_kv_heads] states
  int64_t num_slots;
  PartialShape slot;
};

// Sums of gradients, float32, that several tasks add to: for one KV head dK and dV of the prefix, then dQ of the tail's
// rows (token - tail_begin) * group + head; rows padded to the kernel's row multiple, all without the scale.
struct GradientShape {
  int64_t prefix_rows, tail_rows, columns;
  int64_t size() const { return (2 * prefix_rows + tail_rows) * columns; }
};

// Documents of one list; for run_ends() the list, with the slots of all its tasks.
struct GradientTask {
  int64_t prefix_begin, prefix_end;
  const int32_t* documents;  // boundaries, num_documents + 1 tokens
  int64_t num_documents;
  int64_t tail_begin, tail_end;
  float* slots;  // [num_slots][num_kv_heads] sums
  int64_t num_slots;
  GradientShape slot;
};

// Sizes that the scratch memory of one thread must hold, in tokens.
struct GradientLimits {
  int64_t segment;  // longest prefix or document
  int64_t tail;
  int64_t slot;  // largest GradientShape::size()
};

struct AttentionKernels {
  int64_t row_multiple;     // partial states pad rows to this
  int64_t column_multiple;  // and head_size to this
  // Bytes of scratch that one thread needs for spans that see at most max_keys keys.
  size_t (*scratch_bytes)(const BlockAttentionArgs&, int64_t max_keys);
  void (*run_task)(const BlockAttentionArgs&, const AttentionTask&, int64_t kv_head, int64_t max_keys, void* scratch);
  void (*run_tail)(const BlockAttentionArgs&, const TailTask&, int64_t kv_head, int64_t max_keys, void* scratch);

  size_t (*backward_scratch_bytes)(const BlockAttentionArgs&, const GradientLimits&);
  // delta[token, head] = sum(dO out) - dlse for the tokens [begin, end).
  void (*row_deltas)(const BlockAttentionBackwardArgs&, int64_t begin, int64_t end, float* delta);
  // Gradients of the documents; what they add to the prefix's dK and dV and to the tail's dQ goes to the task's slot.
  void (*run_documents)(const BlockAttentionBackwardArgs&, const GradientTask&, const GradientLimits&,
                        const float* delta, int64_t kv_head, void* scratch);
  // Gradients of the prefix and the tail: the slots in order, then their own rows.
  void (*run_ends)(const BlockAttentionBackwardArgs&, const GradientTask&, const GradientLimits&, const float* delta,
                   int64_t kv_head, void* scratch);
};

// Query rows and the keys [key_begin, key_end) of one segment that they see up to their own position.
struct ScoreTask {
  const int64_t* order;  // [num_rows] indices into DocumentScoresArgs::rows, positions rising
  int64_t num_rows;
  int64_t num_list_rows;  // all query rows of the list
  int64_t key_begin, key_end;
  const float* weights;  // [num_tokens], or null
};

// Softmax denominator sum * 2^maximum of scores in units of log2; kept apart, because their logarithm in float32 would
// be off by an ulp of the largest score, and so would every probability made from it. weighted is the sum with every
// key's term times its weight, 0 without weights.
struct SoftmaxState {
  float maximum, sum, weighted;
};

// Gradient for the product q . k_j of one row and head, whose score is s_j in units of log2, but for the derivative of
// the softcap: 2^(s_j - maximum) * factor * (weight_j - mean), the difference only where there are weights. A row whose
// factor is 0 takes no part.
struct ScoreGradient {
  float maximum, factor, mean;
};

struct ScoreKernels {
  size_t (*scratch_bytes)(const DocumentScoresArgs&, int64_t max_keys, bool backward);
  // states[i][head] of the i-th row of the task over its keys, [num_rows, num_query_heads], for one KV head's heads.
  void (*reduce)(const DocumentScoresArgs&, const ScoreTask&, int64_t kv_head, SoftmaxState* states, int64_t max_keys,
                 void* scratch);
  // out[key] = sum over rows and heads of their softmax, given its states [all rows, num_query_heads], / num_list_rows,
  // for the keys of the task; out starts as zeros.
  void (*mass)(const DocumentScoresArgs&, const ScoreTask&, const SoftmaxState* states, int64_t max_keys,
               void* scratch);
  // For one KV head: its part of grad_key [all tokens, num_kv_heads, head_size] for the keys of the task, and what
  // these keys add to the query gradients of the rows that take part, grad_query [num_rows, num_query_heads,
  // head_size]. gradients: [num_rows, num_query_heads].
  void (*backward)(const DocumentScoresArgs&, const ScoreTask&, int64_t kv_head, const ScoreGradient* gradients,
                   float* grad_query, void* grad_key, int64_t max_keys, void* scratch);
};

#define RANKERNEL_DECLARE_ISA(isa)                 \
  namespace isa {                                  \
  AttentionKernels attention_kernels(DType dtype); \
  ScoreKernels score_kernels(DType dtype);         \
  }
RANKERNEL_DECLARE_ISA(scalar)
RANKERNEL_DECLARE_ISA(avx2)
RANKERNEL_DECLARE_ISA(avx512)
RANKERNEL_DECLARE_ISA(avx512bf16)
RANKERNEL_DECLARE_ISA(amx)
RANKERNEL_DECLARE_ISA(amx_emulated)
#undef RANKERNEL_DECLARE_ISA

}  // namespace rankernel
