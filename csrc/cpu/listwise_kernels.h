// What the driver (listwise_loss.cpp, baseline code) and the kernels of one instruction set agree on: plain structs.
// Item arrays are padded: kPadding floats behind the last item may be read; those of the scores of pairs are -inf, so
// that sigmoid(-x) and softplus(-x) against them are 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rankernel {

constexpr int64_t kPadding = 16;

// What a pair (i, j) adds to the loss and to the sums of its two items. x = sigma (scores_i - scores_j).
enum class PairTerm : int {
  // weight softplus(-x), and its derivative with respect to x added to the sum of i, subtracted from that of j; weight
  // =
  kOne,           // 1
  kOneByProduct,  // 1, from a = exp(sigma scores) and b = exp(-sigma scores), see PairTask::terms_per_log
  kInverseRanks,  // 1 / (a_i + a_j)
  kAbsolute,      // |a_i - a_j| |b_i - b_j| cut
  kRelative,      // |a_i - a_j| table[|c_i - c_j|] cut
  kCombined,      // |a_i - a_j| (mu table[|c_i - c_j|] + |b_i - b_j|) cut
  kReweighted,    // |a_i - a_j| table[|c_i - c_j|] b of the item with the larger c
  kSoft,          // cross entropy of sigmoid(x) with the target sigmoid(a_i - a_j), a_i >= a_j
  kBothWays,      // (a_i softplus(-x) + a_j softplus(x)) cut
  // No loss:
  kSmoothRank,      // sigmoid(-x) to i, sigmoid(x) to j
  kSmoothGradient,  // (a_j - a_i) sigmoid'(x) to i, its negative to j
  // The same two, with e^-x as a_j b_i, a = exp(sigma scores), b = exp(-sigma scores), and c for a:
  kSmoothRankByProduct,
  kSmoothGradientByProduct,
  kSpread,          // |x| to both
  kSpreadGradient,  // sign(x) (a_i + a_j) to i, its negative to j
};

// Whether `inside` of both items or of either decides that a pair counts: cut is 1 or 0.
enum class PairCut : int { kBoth, kEither };

struct PairTask {
  PairTerm term;
  PairCut cut;
  int64_t num_items;
  float sigma, mu;
  const float* scores;
  const float *a, *b, *c;
  const float* inside;
  const float* table;
  // kOneByProduct: how many columns of four rows fit one product of 1 + e^-x in float's range.
  int64_t terms_per_log;
  const int32_t* first;  // the pairs of i are (i, j), first[i] <= j < num_items; first[i] > i, and it never falls
};

// K_ij = exp(z_ij - max_j z_ij), z_ij = ((n + 1 - 2 i) scores_j - spread_j) / temperature, rows i from 1: NeuralSort's
// matrix before its rows are normalised. That of a short list is stored by the first pass; else every pass computes the
// rows again.
struct SinkhornMatrix {
  int64_t n;
  const float* scores;
  const float* spread;  // sum_k |scores_j - scores_k|
  float inverse_temperature;
  float* rows;          // [n, n] if stored, else [n] work
  bool stored, filled;  // filled: the first pass is done
};

// One step back through the scalings: with x_ij = factor_i h_j u_i K_ij v_j, g_i = sum_j x_ij and y_ij = -g_i u_i K_ij
// v_before_j, this adds to gradient_j the sums over i of y_ij (and x_ij if direct), to plain_j those of x_ij + y_ij and
// to weighted_j those of (n + 1 - 2 i)(x_ij + y_ij).
struct SinkhornStep {
  const float *factor, *h, *v, *u, *v_before;
  bool direct;
  double *gradient, *plain, *weighted;
};

// ranks[i] = number of keys that are less than keys[i], or equal and earlier. kPadding keys behind the last may be
// read.
using CountRanks = void (*)(const uint32_t* keys, int64_t n, int32_t* ranks);

struct ListwiseKernels {
  CountRanks count_ranks;
  // Adds the pairs of the rows [begin, end) to sums[num_items] and returns their loss.
  double (*pairs)(const PairTask&, int64_t begin, int64_t end, double* sums);
  // Smallest and largest of x.
  void (*extent)(const float* x, int64_t n, float* low, float* high);
  // out = exp(scale (x - shift)); returns its sum.
  double (*exponentials)(const float* x, int64_t n, float shift, float scale, float* out);
  // softplus(-x) and sigmoid(-x)
  void (*logistic)(const float* x, int64_t n, float* softplus, float* sigmoid);
  // sum of sigmoid(sigma (x + shift))
  double (*sigmoid_sum)(const float* x, int64_t n, float sigma, float shift);
  // u_i = 1 / sum_j K_ij v_j; columns_j = sum_i u_i K_ij.
  void (*sinkhorn)(const SinkhornMatrix&, const float* v, float* u, double* columns);
  // columns_j = sum_i weights_i K_ij
  void (*sinkhorn_columns)(const SinkhornMatrix&, const float* weights, double* columns);
  void (*sinkhorn_back)(const SinkhornMatrix&, const SinkhornStep&);
};

#define RANKERNEL_DECLARE_ISA(isa)    \
  namespace isa {                     \
  ListwiseKernels listwise_kernels(); \
  }
RANKERNEL_DECLARE_ISA(scalar)
RANKERNEL_DECLARE_ISA(avx2)
RANKERNEL_DECLARE_ISA(avx512)
#undef RANKERNEL_DECLARE_ISA

}  // namespace rankernel
