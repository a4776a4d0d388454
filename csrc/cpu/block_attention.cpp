// Cuts the packed row into tasks and runs them on the chosen kernels. A task is some documents of one list with one KV
// head: it packs every document's K and V once and uses them for the document's own rows and for the tail's rows. What
// the tail saw goes to the task's slot; a second pass adds the prefix and the tail itself and merges the slots in
// order. How the work is cut depends on the layout alone, so results do not depend on the number of threads.

#include "../block_attention.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "list_spans.h"
#include "scratch.h"

namespace rankernel {
namespace {

constexpr int64_t kMaxRows = 512;  // query tokens of one span

struct Work {
  std::vector<RowSpan> spans;
  std::vector<AttentionTask> tasks;  // `spans` and `slots` hold offsets until place() turns them into pointers
  std::vector<size_t> first_span, first_slot;
  std::vector<TailTask> tails;
  std::vector<size_t> tail_slot;
  size_t slot_floats = 0;
  int64_t max_keys = 0;

  void add_task(size_t begin, int64_t tail_begin, int64_t tail_end, PartialShape shape, int64_t num_kv_heads) {
    if (begin == spans.size()) return;
    first_span.push_back(begin);
    first_slot.push_back(slot_floats);
    tasks.push_back({nullptr, static_cast<int64_t>(spans.size() - begin), tail_begin, tail_end, nullptr, shape});
    slot_floats += static_cast<size_t>(shape.size() * num_kv_heads);
  }

  void add_span(const RowSpan& span) {
    spans.push_back(span);
    max_keys = std::max(max_keys, span.prefix_end - span.prefix_begin + span.row_end - span.own_begin);
  }

  void place(float* slots) {
    for (size_t i = 0; i < tasks.size(); ++i) {
      tasks[i].spans = spans.data() + first_span[i];
      tasks[i].slots = slots + first_slot[i];
    }
    for (size_t i = 0; i < tails.size(); ++i) tails[i].slots = slots + tail_slot[i];
  }
};

// Rows of one causal run (a prefix, or a whole causal list), each span a task.
void add_causal(Work& work, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kMaxRows) {
    const size_t first = work.spans.size();
    work.add_span({begin, begin, begin, row, std::min(row + kMaxRows, end)});
    work.add_task(first, 0, 0, {0, 0}, 0);
  }
}

void add_list(Work& work, const ListSpan& list, const BlockAttentionArgs& args, const AttentionKernels& kernels) {
  add_causal(work, list.begin, list.prefix_end);
  const int64_t group = args.num_query_heads / args.num_kv_heads, tail = list.end - list.tail_begin;
  PartialShape shape{0, 0};
  if (tail > 0)
    shape = {round_up(tail * group, kernels.row_multiple), round_up(args.head_size, kernels.column_multiple)};
  const int64_t task_tokens = tokens_per_task(list.tail_begin - list.prefix_end, args.num_kv_heads, tail);
  const size_t first_slot = work.slot_floats, first_task = work.tasks.size();
  size_t first = work.spans.size();
  int64_t tokens = 0;
  for (int64_t d = 0; d < list.num_documents; ++d) {
    for (int64_t row = list.documents[d]; row < list.documents[d + 1]; row += kMaxRows) {
      const int64_t row_end = std::min<int64_t>(row + kMaxRows, list.documents[d + 1]);
      work.add_span({list.begin, list.prefix_end, list.documents[d], row, row_end});
      tokens += row_end - row;
      if (tokens >= task_tokens) {
        work.add_task(first, list.tail_begin, list.end, shape, args.num_kv_heads);
        first = work.spans.size();
        tokens = 0;
      }
    }
  }
  work.add_task(first, list.tail_begin, list.end, shape, args.num_kv_heads);
  const int64_t num_slots = static_cast<int64_t>(work.tasks.size() - first_task);
  for (int64_t row = list.tail_begin; row < list.end; row += kMaxRows) {
    const RowSpan span{list.begin, list.prefix_end, list.tail_begin, row, std::min(row + kMaxRows, list.end)};
    work.max_keys = std::max(work.max_keys, span.prefix_end - span.prefix_begin + span.row_end - span.own_begin);
    work.tails.push_back({span, list.tail_begin, nullptr, num_slots, shape});
    work.tail_slot.push_back(first_slot);
  }
}

}  // namespace

Status block_attention(const BlockAttentionArgs& args, int isa) {
  std::vector<ListSpan> lists;
  if (const Status status = read_lists(args.layout, lists); status != Status::kOk) return status;
  const AttentionKernels kernels = select_attention_kernels(args.dtype, isa);
  Work work;
  for (const ListSpan& list : lists) {
    if (args.layout.causal) {
      add_causal(work, list.begin, list.end);
    } else {
      add_list(work, list, args, kernels);
    }
  }
  const int threads = std::max(args.num_threads, 1);
  const Scratch scratch(kernels.scratch_bytes(args, work.max_keys), threads);
  const size_t slot_bytes = work.slot_floats * sizeof(float);
  const Scratch slots(slot_bytes, 1);
  advise_huge_pages(slots.data(), slot_bytes);
  advise_huge_pages(args.out.data,
                    static_cast<size_t>(args.layout.num_tokens * args.out.token_stride) * element_size(args.dtype));
  work.place(reinterpret_cast<float*>(slots.data()));
  const int64_t heads = args.num_kv_heads;
  const int64_t num_tasks = static_cast<int64_t>(work.tasks.size()) * heads;
  const int64_t num_tails = static_cast<int64_t>(work.tails.size()) * heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_tasks; ++i)
      kernels.run_task(args, work.tasks[static_cast<size_t>(i / heads)], i % heads, work.max_keys, scratch.of_thread());
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_tails; ++i)
      kernels.run_tail(args, work.tails[static_cast<size_t>(i / heads)], i % heads, work.max_keys, scratch.of_thread());
  }
  return Status::kOk;
}

}  // namespace rankernel
