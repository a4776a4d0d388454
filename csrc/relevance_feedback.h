// Moves query vectors towards a teacher's ranking of their documents, by Adam on a loss of the scaled dot products:
// FIRST's test-time relevance feedback (arXiv 2406.15657). Per query q with documents P and teacher scores t:
//   kl:               KL(softmax(t) || softmax(z)),  z = scale * P q
//   weighted_ranknet: 1/pairs * sum_{t_i > t_j} log(1 + exp(z_j - z_i)) / (r_i + r_j),  r_i = 1 + #{j: t_j > t_i}
// Adam's betas are 0.9 and 0.999, its epsilon 1e-8. Queries learn nothing, and stay as they are, that have fewer than
// two documents, or whose scale is to be computed where all of t or all of P q are equal.
#pragma once

#include "types.h"

namespace rankernel {

enum class FeedbackLoss : int { kKl, kWeightedRankNet };

struct RelevanceFeedbackArgs {
  DType dtype;                            // of documents
  float* queries;                         // [num_queries, size], updated in place
  const void* documents;                  // [num_queries, num_documents, size]; the last dimension is contiguous
  int64_t query_stride, document_stride;  // of documents, in elements
  const float* teacher;                   // [num_queries, num_documents], finite where valid
  const uint8_t* where;                   // [num_queries, num_documents], 0 for documents to leave out; or null
  int64_t num_queries, num_documents, size;
  FeedbackLoss loss;
  double learning_rate;
  int64_t num_steps;
  float scale;  // 0: half the range of t over the range of the initial P q
  int num_threads;
};

void relevance_feedback(const RelevanceFeedbackArgs& args, int isa);

}  // namespace rankernel
