// The lists of a packed row, read once from tensors that are not trusted.
#pragma once

#include <algorithm>
#include <vector>

#include "../types.h"

namespace rankernel {

struct ListSpan {
  int64_t begin, prefix_end, tail_begin, end;  // tokens; a causal list has no prefix and no tail of its own
  const int32_t* documents;                    // boundaries of its documents, num_documents + 1 tokens
  int64_t num_documents;
};

// kBadLayout unless the boundaries rise from 0 to num_tokens and every list has at least a prefix and a tail.
inline Status read_lists(const Layout& layout, std::vector<ListSpan>& lists) {
  const int32_t* cu = layout.cu_seqlens;
  if (cu[0] != 0 || cu[layout.num_segments] != layout.num_tokens) return Status::kBadLayout;
  for (int64_t s = 0; s < layout.num_segments; ++s)
    if (cu[s] > cu[s + 1]) return Status::kBadLayout;
  if (layout.list_offsets[0] != 0 || layout.list_offsets[layout.num_lists] != layout.num_segments)
    return Status::kBadLayout;
  for (int64_t l = 0; l < layout.num_lists; ++l)
    if (layout.list_offsets[l + 1] - static_cast<int64_t>(layout.list_offsets[l]) < 2) return Status::kBadLayout;
  lists.resize(static_cast<size_t>(layout.num_lists));
  for (int64_t l = 0; l < layout.num_lists; ++l) {
    const int64_t first = layout.list_offsets[l], last = layout.list_offsets[l + 1];
    lists[static_cast<size_t>(l)] = {cu[first], cu[first + 1],  cu[last - 1],
                                     cu[last],  cu + first + 1, last - first - 2};
  }
  return Status::kOk;
}

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Document tokens of one attention task: about 256 tasks in a call, and at least as many tokens as the slot of a task
// has rows of the prefix and the tail, so that all slots together stay O(tokens).
inline int64_t tokens_per_task(int64_t document_tokens, int64_t num_kv_heads, int64_t slot_rows) {
  constexpr int64_t kTasksPerCall = 256, kMinTokens = 256, kMaxTokens = 2048;
  return std::max(slot_rows, std::clamp(document_tokens * num_kv_heads / kTasksPerCall, kMinTokens, kMaxTokens));
}

}  // namespace rankernel
