// One task is one query: its result depends on nothing else, so neither the batch nor the number of threads shows.

#include "../relevance_feedback.h"

#include <algorithm>

#include "dispatch.h"
#include "scratch.h"

namespace rankernel {

void relevance_feedback(const RelevanceFeedbackArgs& args, int isa) {
  const FeedbackKernels kernels = select_feedback_kernels(args.dtype, isa);
  const int64_t most = args.num_documents;
  const int threads =
      static_cast<int>(std::clamp<int64_t>(args.num_threads, 1, std::max<int64_t>(args.num_queries, 1)));
  const Scratch orders(static_cast<size_t>(most) * (sizeof(int64_t) + sizeof(float)), threads);
  const Scratch scratch(kernels.scratch_bytes(args), threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t query = 0; query < args.num_queries; ++query) {
    int64_t* const order = static_cast<int64_t*>(orders.of_thread());
    float* const sorted = reinterpret_cast<float*>(order + most);
    const float* const teacher = args.teacher + query * most;
    int64_t count = 0;
    for (int64_t d = 0; d < most; ++d)
      if (!args.where || args.where[query * most + d]) order[count++] = d;
    if (count < 2) continue;
    std::sort(order, order + count, [teacher](int64_t a, int64_t b) {
      return teacher[a] > teacher[b] || (teacher[a] == teacher[b] && a < b);
    });
    std::transform(order, order + count, sorted, [teacher](int64_t d) { return teacher[d]; });
    const size_t offset = static_cast<size_t>(query * args.query_stride) * element_size(args.dtype);
    kernels.run(
        args,
        {args.queries + query * args.size, static_cast<const char*>(args.documents) + offset, order, sorted, count},
        scratch.of_thread());
  }
}

}  // namespace rankernel
