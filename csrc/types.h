// Element types and the packed-row layout, as every native op sees them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rankernel {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A [tokens, heads, head_size] tensor whose last dimension is contiguous. Strides count elements.
struct TokenHeads {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
};

// Boundaries of the lists in one packed row (python/rankernel/layout.py). Untrusted: checked by make_spans().
struct Layout {
  const int32_t* cu_seqlens;  // [num_segments + 1]
  const int32_t*
      list_offsets;  // [num_lists + 1], the segments of each list; the first is its prefix, the last its tail
  int64_t num_segments;
  int64_t num_lists;
  int64_t num_tokens;
  bool causal;  // every list is one causal sequence
};

// Why an op did nothing. Python turns these into exceptions.
enum class Status : int {
  kOk = 0,
  kBadLayout = 1,
  kBadRows = 2,
  kBadOffsets = 3,
  kBadCandidates = 4,
  kBadSegments = 5
};

}  // namespace rankernel
