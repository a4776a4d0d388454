// Cuts the backward pass into tasks, as block_attention.cpp does the forward pass: a task is some whole documents of
// one list with one KV head. It writes the gradients of its documents; what it adds to the prefix's dK and dV and to
// the tail's dQ goes to its slot. A second pass adds the slots in order and the prefix and the tail themselves; a
// causal list is one prefix. How the work is cut depends on the layout alone, so results do not depend on the number of
// threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "../block_attention.h"
#include "dispatch.h"
#include "list_spans.h"
#include "scratch.h"

namespace rankernel {
namespace {

constexpr int64_t kDeltaTokens = 64;  // of one step of the pass over delta

struct Work {
  std::vector<GradientTask> documents, ends;  // `slots` is set by place()
  std::vector<size_t> first_slot;             // of each list, in floats
  size_t slot_floats = 0;
  GradientLimits limits{0, 0, 0};

  void place(float* slots, int64_t num_kv_heads) {
    size_t task = 0;
    for (size_t list = 0; list < ends.size(); ++list) {
      ends[list].slots = slots + first_slot[list];
      for (int64_t slot = 0; slot < ends[list].num_slots; ++slot)
        documents[task++].slots = ends[list].slots + slot * num_kv_heads * ends[list].slot.size();
    }
  }
};

void add_list(Work& work, const ListSpan& list, const BlockAttentionArgs& args, const AttentionKernels& kernels) {
  const int64_t prefix_end = args.layout.causal ? list.end : list.prefix_end;
  const int64_t tail_begin = args.layout.causal ? list.end : list.tail_begin;
  const int64_t prefix = prefix_end - list.begin, tail = list.end - tail_begin;
  const int64_t group = args.num_query_heads / args.num_kv_heads;
  const GradientShape shape{round_up(prefix, kernels.row_multiple), round_up(tail * group, kernels.row_multiple),
                            round_up(args.head_size, kernels.column_multiple)};
  GradientTask task{list.begin, prefix_end, list.documents, 0, tail_begin, list.end, nullptr, 1, shape};
  work.limits.segment = std::max(work.limits.segment, prefix);
  work.limits.tail = std::max(work.limits.tail, tail);
  work.limits.slot = std::max(work.limits.slot, shape.size());
  const int64_t num_documents = args.layout.causal ? 0 : list.num_documents;
  const int64_t task_tokens = tokens_per_task(tail_begin - prefix_end, args.num_kv_heads, std::max(prefix, tail));
  const size_t first_task = work.documents.size();
  for (int64_t d = 0; d < num_documents; ++d) {
    const int32_t* const end = list.documents + d + 1;
    work.limits.segment = std::max<int64_t>(work.limits.segment, *end - end[-1]);
    ++task.num_documents;
    if (*end - *task.documents >= task_tokens || d + 1 == num_documents) {
      work.documents.push_back(task);
      task.documents = end;
      task.num_documents = 0;
    }
  }
  task.num_slots = static_cast<int64_t>(work.documents.size() - first_task);
  work.ends.push_back(task);
  work.first_slot.push_back(work.slot_floats);
  work.slot_floats += static_cast<size_t>(task.num_slots * args.num_kv_heads * shape.size());
}

}  // namespace

Status block_attention_backward(const BlockAttentionBackwardArgs& args, int isa) {
  const BlockAttentionArgs& forward = args.forward;
  std::vector<ListSpan> lists;
  if (const Status status = read_lists(forward.layout, lists); status != Status::kOk) return status;
  const AttentionKernels kernels = select_attention_kernels(forward.dtype, isa);
  Work work;
  for (const ListSpan& list : lists) add_list(work, list, forward, kernels);
  const int threads = std::max(forward.num_threads, 1);
  const int64_t tokens = forward.layout.num_tokens, query_heads = forward.num_query_heads, heads = forward.num_kv_heads;
  const Scratch scratch(kernels.backward_scratch_bytes(forward, work.limits), threads);
  const Scratch slots(work.slot_floats * sizeof(float), 1);
  work.place(reinterpret_cast<float*>(slots.data()), heads);
  std::vector<float> delta(static_cast<size_t>(tokens * query_heads));
  const int64_t num_steps = (tokens + kDeltaTokens - 1) / kDeltaTokens;
  std::vector<double> sink_sums(forward.sinks ? static_cast<size_t>(num_steps * query_heads) : 0);
  advise_huge_pages(slots.data(), work.slot_floats * sizeof(float));
  for (const TokenHeads* gradient : {&args.grad_query, &args.grad_key, &args.grad_value})
    advise_huge_pages(gradient->data,
                      static_cast<size_t>(tokens * gradient->token_stride) * element_size(forward.dtype));
  const int64_t num_documents = static_cast<int64_t>(work.documents.size()) * heads;
  const int64_t num_ends = static_cast<int64_t>(work.ends.size()) * heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t step = 0; step < num_steps; ++step) {
      const int64_t begin = step * kDeltaTokens, end = std::min(begin + kDeltaTokens, tokens);
      kernels.row_deltas(args, begin, end, delta.data());
      for (int64_t row = begin * query_heads; forward.sinks && row < end * query_heads; ++row) {
        const int64_t head = row % query_heads;
        sink_sums[static_cast<size_t>(step * query_heads + head)] -=
            std::exp(forward.sinks[head] - forward.lse[row]) * delta[static_cast<size_t>(row)];
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_documents; ++i)
      kernels.run_documents(args, work.documents[static_cast<size_t>(i / heads)], work.limits, delta.data(), i % heads,
                            scratch.of_thread());
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_ends; ++i)
      kernels.run_ends(args, work.ends[static_cast<size_t>(i / heads)], work.limits, delta.data(), i % heads,
                       scratch.of_thread());
  }
  for (int64_t head = 0; forward.sinks && head < query_heads; ++head) {
    double sum = 0.0;
    for (int64_t step = 0; step < num_steps; ++step) sum += sink_sums[static_cast<size_t>(step * query_heads + head)];
    args.grad_sinks[head] = static_cast<float>(sum);
  }
  return Status::kOk;
}

}  // namespace rankernel
