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

struct AttentionKernels {
  int64_t row_multiple;     // partial states pad rows to this
  int64_t column_multiple;  // and head_size to this
  // Bytes of scratch that one thread needs for spans that see at most max_keys keys.
  size_t (*scratch_bytes)(const BlockAttentionArgs&, int64_t max_keys);
  void (*run_task)(const BlockAttentionArgs&, const AttentionTask&, int64_t kv_head, int64_t max_keys, void* scratch);
  void (*run_tail)(const BlockAttentionArgs&, const TailTask&, int64_t kv_head, int64_t max_keys, void* scratch);
};

// Query rows and the keys [key_begin, key_end) of one segment that they see up to their own position.
struct ScoreTask {
  const int64_t* order;  // [num_rows] indices into DocumentScoresArgs::rows, positions rising
  int64_t num_rows;
  int64_t num_list_rows;  // all query rows of the list
  int64_t key_begin, key_end;
};

// Softmax denominator sum * 2^maximum of scores in units of log2; kept apart, because their logarithm in float32 would
// be off by an ulp of the largest score, and so would every probability made from it.
struct SoftmaxState {
  float maximum, sum;
};

struct ScoreKernels {
  size_t (*scratch_bytes)(const DocumentScoresArgs&, int64_t max_keys);
  // states[i][head] of the i-th row of the task over its keys, [num_rows, num_query_heads], for one KV head's heads.
  void (*reduce)(const DocumentScoresArgs&, const ScoreTask&, int64_t kv_head, SoftmaxState* states, int64_t max_keys,
                 void* scratch);
  // out[key] = sum over rows and heads of their softmax, given its states [all rows, num_query_heads], / num_list_rows,
  // for the keys of the task; out starts as zeros.
  void (*mass)(const DocumentScoresArgs&, const ScoreTask&, const SoftmaxState* states, int64_t max_keys,
               void* scratch);
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
