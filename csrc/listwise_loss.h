// Ranking losses over jagged lists, and their gradients, in one call. METHODS.md section 8 has the formulas,
// python/rankernel/reference/listwise_loss.py states them in PyTorch.
#pragma once

#include "types.h"

namespace rankernel {

// In the order of python/rankernel/listwise.py.
enum class ListwiseKind : int {
  kRankNet,
  kWeightedRankNet,
  kSoftRankNet,
  kLambdaRank,
  kNdcgLoss1,
  kNdcgLoss2,
  kNdcgLoss2pp,
  kLipo,
  kDcgLambda,
  kDcg2Lambda,
  kSkipRankNet,
  kListNet,
  kSoftmax,
  kInfoNce,
  kDecoupledSoftmax,
  kKlDistillation,
  kMarginMse,
  kListMle,
  kPListMle,
  kPgRank,
  kApproxNdcg,
  kApproxMrr,
  kNeuralNdcg,
  kSoftTopK,
  kGroCo,
};

enum class ListwiseReduction : int { kNone, kSum, kMean, kPairMean };

// `Settings` of python/rankernel/listwise.py, which explains the fields (`count` is its `number`).
struct ListwiseSettings {
  double sigma, temperature, unit, k, mu, margin, count, tolerance, option, divisor;
};

struct ListwiseArgs {
  DType dtype;
  const void* scores;      // [num_items], dtype
  const float* labels;     // [num_items]
  const uint8_t* where;    // [num_items], 0 for items to leave out; or null
  const int64_t* offsets;  // [num_lists + 1], rising, from 0 or more to at most num_items
  int64_t num_items, num_lists;
  ListwiseKind kind;
  ListwiseReduction reduction;
  ListwiseSettings settings;
  uint64_t seed;  // list l draws with seed + l
  float* loss;    // [num_lists] for kNone, else [1]
  float* grad;    // [num_items]: of the loss that an item's list is part of, with respect to its score
  int num_threads;
};

// kBadOffsets, and nothing written, for offsets that fall or leave the items.
Status listwise_loss(const ListwiseArgs& args, int isa);

}  // namespace rankernel
