// Splits candidates, and for log-probabilities the vocabulary, into tasks. The vocabulary is cut the same way for any
// batch and number of threads, and the partial sums are added in order, so neither shows in the result.

#include "../candidate_logits.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "ordering.h"
#include "scratch.h"

namespace rankernel {
namespace {

constexpr int64_t kPart = 512;                     // vocabulary entries of a task
constexpr int64_t kSerialWork = int64_t{1} << 18;  // multiply-adds that a second thread does not speed up

int threads_for(const CandidateLogitsArgs& args, int64_t rows) {
  return args.num_rows * rows * args.hidden_size < kSerialWork ? 1 : args.num_threads;
}

bool in_vocabulary(const CandidateLogitsArgs& args) {
  const int64_t count = args.num_candidates * (args.candidates_stride == 0 ? 1 : args.num_rows);
  return std::all_of(args.candidates, args.candidates + count,
                     [&](int64_t id) { return id >= 0 && id < args.vocabulary; });
}

void score(const CandidateLogitsArgs& args, const CandidateKernels& kernels) {
  const int64_t row_blocks = (args.num_rows + kHiddenBlock - 1) / kHiddenBlock;
  const int64_t blocks = (args.num_candidates + kWeightBlock - 1) / kWeightBlock;
  parallel_for(threads_for(args, args.num_candidates), row_blocks * blocks, [&](int64_t task) {
    const int64_t row = task / blocks * kHiddenBlock, begin = task % blocks * kWeightBlock;
    kernels.score(args, row, std::min(kHiddenBlock, args.num_rows - row), begin,
                  std::min(kWeightBlock, args.num_candidates - begin));
  });
}

void subtract_log_sum_exp(const CandidateLogitsArgs& args, const CandidateKernels& kernels) {
  const int64_t parts = (args.vocabulary + kPart - 1) / kPart;
  std::vector<PartialSum> sums(static_cast<size_t>(parts * args.num_rows));
  const Scratch prepared(kernels.prepared_bytes(args), 1);
  kernels.prepare(args, prepared.data());
  parallel_for(threads_for(args, args.vocabulary), parts, [&](int64_t part) {
    kernels.reduce(args, prepared.data(), part * kPart, std::min((part + 1) * kPart, args.vocabulary),
                   sums.data() + part * args.num_rows);
  });
  for (int64_t b = 0; b < args.num_rows; ++b) {
    float maximum = -HUGE_VALF;
    double sum = 0.0;
    for (int64_t part = 0; part < parts; ++part)
      maximum = std::max(maximum, sums[static_cast<size_t>(part * args.num_rows + b)].maximum);
    for (int64_t part = 0; part < parts; ++part) {
      const PartialSum& of_part = sums[static_cast<size_t>(part * args.num_rows + b)];
      sum += of_part.sum * std::exp(of_part.maximum - maximum);
    }
    // In float64: rounded to float32, it would be off by half an ulp of the largest logit, and so the results.
    const double lse = maximum + std::log(sum);
    args.lse[b] = static_cast<float>(lse);
    float* const out = args.out + b * args.num_candidates;
    for (int64_t c = 0; c < args.num_candidates; ++c) out[c] = static_cast<float>(out[c] - lse);
  }
}

}  // namespace

Status candidate_logits(const CandidateLogitsArgs& args, int isa) {
  if (!in_vocabulary(args)) return Status::kBadCandidates;
  const CandidateKernels kernels = select_candidate_kernels(args.dtype, isa);
  score(args, kernels);
  if (args.lse) subtract_log_sum_exp(args, kernels);
  return Status::kOk;
}

}  // namespace rankernel
