// Brings rows that use the same factors together and cuts them into tasks. How they are cut depends on the sizes alone,
// and partial gradients are added in order, so results do not depend on the number of threads.

#include "../lora_linear.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "ordering.h"
#include "scratch.h"

namespace rankernel {
namespace {

constexpr int64_t kTaskRows = 64, kTaskColumns = 1024;
constexpr int64_t kSerialWork = int64_t{1} << 18;  // multiply-adds that a second thread does not speed up

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// The rows of each group, in order.
struct Groups {
  std::vector<LoraGroup> groups;
  std::vector<int64_t> rows;
  int64_t max_rank = 0;

  // Without segments one group; with them one for each factor, and a last one for rows without.
  Status make(const LoraFactor* factors, int64_t num_factors, int64_t num_rows, const LoraSegments& segments) {
    if (!segments.offsets) {
      add(factors, num_factors, nullptr, num_rows);
      return Status::kOk;
    }
    if (!valid(segments, num_factors, num_rows)) return Status::kBadSegments;
    std::vector<int64_t> ends(static_cast<size_t>(num_factors) + 2, 0);
    const auto group_of = [&](int64_t segment) {
      const int64_t adapter = segments.adapters[segment];
      return static_cast<size_t>(adapter < 0 ? num_factors : adapter);
    };
    for (int64_t i = 0; i < segments.count; ++i) ends[group_of(i) + 1] += segments.offsets[i + 1] - segments.offsets[i];
    for (size_t i = 1; i < ends.size(); ++i) ends[i] += ends[i - 1];
    rows.resize(static_cast<size_t>(num_rows));
    for (int64_t i = 0; i <= num_factors; ++i) {
      const int64_t begin = ends[static_cast<size_t>(i)];
      add(factors + i, i < num_factors, rows.data() + begin, ends[static_cast<size_t>(i) + 1] - begin);
    }
    for (int64_t i = 0; i < segments.count; ++i)
      for (int64_t row = segments.offsets[i]; row < segments.offsets[i + 1]; ++row)
        rows[static_cast<size_t>(ends[group_of(i)]++)] = row;
    return Status::kOk;
  }

  static bool valid(const LoraSegments& segments, int64_t num_factors, int64_t num_rows) {
    if (segments.offsets[0] != 0 || segments.offsets[segments.count] != num_rows) return false;
    for (int64_t i = 0; i < segments.count; ++i) {
      if (segments.offsets[i] > segments.offsets[i + 1]) return false;
      if (segments.adapters[i] < -1 || segments.adapters[i] >= num_factors) return false;
    }
    return true;
  }

  void add(const LoraFactor* factors, int64_t num_factors, const int64_t* of_group, int64_t num_rows) {
    int64_t rank = 0;
    for (int64_t i = 0; i < num_factors; ++i) rank += factors[i].rank;
    groups.push_back({factors, num_factors, rank, of_group, num_rows, nullptr});
    max_rank = std::max(max_rank, rank);
  }

  int threads(int64_t size, int num_threads) const {
    int64_t work = 0;
    for (const LoraGroup& group : groups) work += group.num_rows * group.rank * size;
    return work < kSerialWork ? 1 : std::max(num_threads, 1);
  }

  // Packs the factors of groups with rows, if pack is given, into memory that the caller keeps.
  Scratch pack(decltype(LoraKernels::pack_shrink) pack, const LoraKernels& kernels, int64_t size, int threads,
               const Scratch& scratch) {
    std::vector<LoraGroup*> used;
    std::vector<size_t> first;
    size_t bytes = 0;
    for (LoraGroup& group : groups) {
      if (!pack || group.rank == 0 || group.num_rows == 0) continue;
      used.push_back(&group);
      first.push_back(bytes);
      bytes += kernels.packed_bytes(group.rank, size);
    }
    Scratch packed(bytes, 1);
    for (size_t i = 0; i < used.size(); ++i) used[i]->packed = packed.data() + first[i];
    const int64_t blocks = blocks_of(size, kLoraColumns);
    parallel_for(threads, static_cast<int64_t>(used.size()) * blocks, [&](int64_t i) {
      pack(*used[static_cast<size_t>(i / blocks)], size, i % blocks * kLoraColumns, scratch.of_thread());
    });
    return packed;
  }
};

}  // namespace

Status lora_shrink(const LoraShrinkArgs& args, int isa) {
  Groups groups;
  const Status status = groups.make(args.factors, args.num_factors, args.num_rows, args.segments);
  if (status != Status::kOk) return status;
  const LoraKernels kernels = select_lora_kernels(args.dtype, args.factor_dtype, isa);
  const int threads = groups.threads(args.size, args.num_threads);
  const Scratch scratch(kernels.scratch_bytes(groups.max_rank), threads);
  const Scratch packed(groups.pack(args.sums ? kernels.pack_shrink : nullptr, kernels, args.size, threads, scratch));

  struct RowTask {
    const LoraGroup* group;
    int64_t begin, end;
    size_t partial;  // of the gradients: where it begins, or kNone
  };
  struct Gradient {
    const LoraGroup* group;
    size_t partials;  // where the first begins, or kNone
    int64_t count;
  };
  constexpr size_t kNone = ~size_t{0};
  std::vector<RowTask> tasks;
  std::vector<Gradient> gradients;
  size_t bytes = 0;
  // Partial gradients may take half the memory of x: for higher ranks multiplications are so many that x is better read
  // twice, the second time by columns.
  const size_t chunk_bytes = static_cast<size_t>(kLoraChunk * args.size) * element_size(args.dtype);
  for (const LoraGroup& group : groups.groups) {
    const bool learns = std::any_of(group.factors, group.factors + group.num_factors,
                                    [](const LoraFactor& factor) { return factor.gradient && factor.rank > 0; });
    const size_t partial_bytes = kernels.partial_bytes(group.rank, args.size);
    const bool together = learns && args.sums && group.num_rows > kLoraChunk && 2 * partial_bytes <= chunk_bytes;
    const int64_t rows = together ? kLoraChunk : kTaskRows;
    if (learns) gradients.push_back({&group, together ? bytes : kNone, blocks_of(group.num_rows, rows)});
    for (int64_t row = 0; args.sums && row < group.num_rows; row += rows) {
      tasks.push_back({&group, row, std::min(row + rows, group.num_rows), together ? bytes : kNone});
      if (together) bytes += partial_bytes;
    }
  }
  const Scratch partials(bytes, 1);
  const auto partial_at = [&](size_t at) {
    return at == kNone ? nullptr : reinterpret_cast<float*>(partials.data() + at);
  };
  parallel_for(threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const RowTask& task = tasks[static_cast<size_t>(i)];
    kernels.shrink(args, *task.group, task.begin, task.end, partial_at(task.partial), scratch.of_thread());
  });
  const int64_t blocks = blocks_of(args.size, kLoraColumns);
  parallel_for(threads, static_cast<int64_t>(gradients.size()) * blocks, [&](int64_t i) {
    const Gradient& gradient = gradients[static_cast<size_t>(i / blocks)];
    const int64_t column = i % blocks * kLoraColumns;
    if (gradient.partials == kNone)
      kernels.gradients(args, *gradient.group, column, scratch.of_thread());
    else
      kernels.add_partials(args, *gradient.group, partial_at(gradient.partials), gradient.count, column);
  });
  return Status::kOk;
}

Status lora_expand(const LoraExpandArgs& args, int isa) {
  Groups groups;
  const Status status = groups.make(args.factors, args.num_factors, args.num_rows, args.segments);
  if (status != Status::kOk) return status;
  const LoraKernels kernels = select_lora_kernels(args.dtype, args.factor_dtype, isa);
  const int threads = groups.threads(args.size, args.num_threads);
  const Scratch scratch(kernels.scratch_bytes(groups.max_rank), threads);
  const Scratch packed(groups.pack(kernels.pack_expand, kernels, args.size, threads, scratch));
  std::vector<std::pair<const LoraGroup*, int64_t>> tasks;  // group and first row
  for (const LoraGroup& group : groups.groups)
    for (int64_t row = 0; group.rank > 0 && row < group.num_rows; row += kTaskRows) tasks.emplace_back(&group, row);
  const int64_t blocks = blocks_of(args.size, kTaskColumns);
  parallel_for(threads, static_cast<int64_t>(tasks.size()) * blocks, [&](int64_t i) {
    const auto [group, row] = tasks[static_cast<size_t>(i / blocks)];
    const int64_t column = i % blocks * kTaskColumns;
    kernels.expand(args, *group, row, std::min(row + kTaskRows, group->num_rows), column,
                   std::min(column + kTaskColumns, args.size), scratch.of_thread());
  });
  return Status::kOk;
}

}  // namespace rankernel
