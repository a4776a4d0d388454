// The low-rank part of y = x W^T + (x A^T) B^T around a base product that a vendor library computes. Both functions
// take factors F = scale * data of [rank, size]: A as it is and B transposed, by their strides.
//   lora_shrink: sums = x F^T, and in the same pass over x gradients = scale * coefficients^T x
//   lora_expand: out += coefficients F, in place with one rounding
// Forward: S = shrink(x, A); expand(y, S, s B). Backward: dS, dB = shrink(dy, s B, S); dA = gradients of
// shrink(x, dS); expand(dx, dS, A).
#pragma once

#include "types.h"

namespace rankernel {

struct LoraFactor {
  const void* data;  // [rank, size]
  int64_t rank, rank_stride, size_stride;
  int64_t column;  // of sums and coefficients, where the first rank stands
  float scale;
  void* gradient;  // [rank, size] in the factor's dtype, or null
  int64_t gradient_rank_stride, gradient_size_stride;
};

// Elements of x, or of the update of out, that are dropped, and the factor of the others: element (row, column) where
// 16 bits of Philox4x32-10 fall below the threshold (python/rankernel/reference/lora_linear.py: keep_mask).
struct LoraDropout {
  uint32_t threshold;  // of 65536; 0: no dropout
  uint64_t seed;
};

// Rows of segment i, [offsets[i], offsets[i + 1]), belong to factor adapters[i], -1 for none. Without segments
// (offsets null) every factor applies to every row. Untrusted: kBadSegments.
struct LoraSegments {
  const int64_t* offsets;   // [count + 1], from 0 to the number of rows
  const int64_t* adapters;  // [count]
  int64_t count;
};

struct LoraShrinkArgs {
  DType dtype;         // of x
  DType factor_dtype;  // that of x, or float32
  const void* x;       // [num_rows, size], the last dimension contiguous
  int64_t x_stride;
  int64_t num_rows, size;
  const LoraFactor* factors;
  int64_t num_factors;
  int64_t width;  // row length of sums and coefficients, whose last dimension is contiguous
  float* sums;    // [num_rows, width], or null; columns without a rank of the row's factors become 0
  int64_t sums_stride;
  const float* coefficients;  // [num_rows, width], or null: no gradients
  int64_t coefficients_stride;
  LoraSegments segments;
  LoraDropout dropout;
  int num_threads;
};

struct LoraExpandArgs {
  DType dtype;         // of out
  DType factor_dtype;  // that of out, or float32
  void* out;           // [num_rows, size], the last dimension contiguous
  int64_t out_stride;
  int64_t num_rows, size;
  const LoraFactor* factors;
  int64_t num_factors;
  const float* coefficients;  // [num_rows, width], the last dimension contiguous
  int64_t coefficients_stride;
  LoraSegments segments;
  LoraDropout dropout;
  int num_threads;
};

Status lora_shrink(const LoraShrinkArgs& args, int isa);
Status lora_expand(const LoraExpandArgs& args, int isa);

}  // namespace rankernel
