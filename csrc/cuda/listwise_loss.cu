// Two forms of kernel make up every loss. Walks have one thread an item: it visits all items of its list, in their
// order, staged through shared memory in tiles, and sums both directions of every pair that it is part of, so that no
// two threads add to the same number. List kernels have one block a list and reduce in a fixed tree over positions
// counted from the list's begin. Hence no atomics, and a list's results do not depend on the rest of the batch.
// Ranks are counted, not sorted: quadratic in time, linear in memory.

#include "listwise_loss.h"

#include <climits>
#include <cmath>
#include <cstring>

#include "block_ops.cuh"

namespace rankernel::cuda {
namespace {

using Kind = ListwiseKind;

struct Item {
  float score, label;
  int32_t list;  // -1: of no list, or left out
};

struct List {
  int64_t begin, end;
  int64_t pairs;  // 0: it does not contribute
  double loss;
  double ideal;  // DCG
  double scale;  // of its items' gradients
  int32_t size;  // items that are not left out
  bool is_ranked;
};

// log of a sum of exp: peak + log_sum, kept apart because the peak may be 1e4 and the rest must stay exact.
struct LogSum {
  float peak, log_sum;
  __device__ float minus(float x) const { return (peak - x) + log_sum; }
};

struct Range {
  int64_t begin, end;
};

// Device pointers and numbers that kernels get by value.
struct Work {
  const int64_t* offsets;
  int64_t num_items, num_lists;
  ListwiseReduction reduction;
  ListwiseSettings settings;
  uint64_t seed;
  float *loss, *grad;
  // Workspace, an element an item:
  Item* items;
  uint64_t* keys;      // the lower the better
  int32_t* ranks;      // 1-based
  int32_t* positions;  // 1-based, among the items of the list that are not left out
  int32_t* pairs;
  float* values;  // the item's part of the loss, or its smooth rank
  float* slopes;  // d loss / d smooth rank
  LogSum* rests;  // over the item and all that rank below it
  // An element a list, settings.count of them, and one in all:
  List* lists;
  double* rewards;
  double* batch_scale;
};

__device__ int64_t thread_index() { return int64_t{blockIdx.x} * kBlock + threadIdx.x; }

__device__ float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x >= 0 ? 1 : e) / (1 + e);
}

__device__ float softplus(float x) { return fmaxf(x, 0) + log1pf(expf(-fabsf(x))); }

// 2^y - 1; labels below 0 gain nothing.
__device__ float gain_of(float label) { return exp2f(fmaxf(label, 0)) - 1; }

__device__ float discount_of(int32_t rank) { return 1 / log2f(1 + static_cast<float>(rank)); }

// Ranks up to this one count.
__device__ int32_t top_of(const Work& w) { return w.settings.k > 0 ? static_cast<int32_t>(w.settings.k) : INT_MAX; }

// First word of Philox4x32-10 (Salmon et al. 2011) for the counter (position, sample, 0, 0).
__device__ uint32_t philox(uint64_t seed, uint32_t sample, uint32_t position) {
  uint32_t c[4] = {position, sample, 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0];
    c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1];
    c[1] = static_cast<uint32_t>(b);
    c[3] = static_cast<uint32_t>(a);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return c[0];
}

// Integers that order like descending numbers; + 0 makes -0 the same as 0.
__device__ uint32_t descending(float x) {
  x += 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? bits : ~(bits | 0x80000000u);
}

__device__ uint64_t descending(double x) {
  x += 0.0;
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits >> 63 ? bits : ~(bits | uint64_t{1} << 63);
}

// visit(j, load(j)) for every item j of the list of this thread's item, in order. All threads of a block call it.
template <class Load, class Visit>
__device__ void walk(const Work& w, Load load, Visit visit) {
  using Record = decltype(load(int64_t{0}));
  __shared__ Record tile[kBlock];
  __shared__ int32_t list_of[kBlock];
  const int64_t i = thread_index();
  const int32_t mine = i < w.num_items ? w.items[i].list : -1;
  Range range{INT64_MAX, 0};
  if (mine >= 0) range = {w.lists[mine].begin, w.lists[mine].end};
  const Range all =
      block_reduce(range, [](Range a, Range b) { return Range{min(a.begin, b.begin), max(a.end, b.end)}; });
  for (int64_t start = all.begin; start < all.end; start += kBlock) {
    const int64_t staged = start + threadIdx.x;
    __syncthreads();
    list_of[threadIdx.x] = staged < all.end ? w.items[staged].list : -1;
    if (list_of[threadIdx.x] >= 0) tile[threadIdx.x] = load(staged);
    __syncthreads();
    const int64_t end = min(range.end, start + kBlock);
    for (int64_t j = max(range.begin, start); j < end; ++j)
      if (list_of[j - start] == mine) visit(j, tile[j - start]);
  }
}

// op over value(i, item) of the items of list l. All threads of a block call it.
template <class T, class Op, class Value>
__device__ T reduce_list(const Work& w, int32_t l, T start, Op op, Value value) {
  const List& list = w.lists[l];
  for (int64_t i = list.begin + threadIdx.x; i < list.end; i += kBlock)
    if (w.items[i].list == l) start = op(start, value(i, w.items[i]));
  return block_reduce(start, op);
}

template <class Value>
__device__ double sum_list(const Work& w, int32_t l, Value value) {
  return reduce_list(w, l, 0.0, [](double a, double b) { return a + b; }, value);
}

template <class Value>
__device__ float max_list(const Work& w, int32_t l, Value value) {
  return reduce_list(w, l, -INFINITY, [](float a, float b) { return fmaxf(a, b); }, value);
}

template <class Visit>
__device__ void for_each_item(const Work& w, int32_t l, Visit visit) {
  const List& list = w.lists[l];
  for (int64_t i = list.begin + threadIdx.x; i < list.end; i += kBlock)
    if (w.items[i].list == l) visit(i, w.items[i]);
}

// Of logit(item) over the items that `keep`, of which there is at least one.
template <class Logit, class Keep>
__device__ LogSum log_sum_list(const Work& w, int32_t l, Logit logit, Keep keep) {
  const float peak = max_list(w, l, [&](int64_t, const Item& item) { return keep(item) ? logit(item) : -INFINITY; });
  const double sum =
      sum_list(w, l, [&](int64_t, const Item& item) { return keep(item) ? expf(logit(item) - peak) : 0.0f; });
  return {peak, logf(static_cast<float>(sum))};
}

__device__ void set_list(List& list, double loss, int64_t pairs) {
  if (threadIdx.x) return;
  list.loss = loss;
  list.pairs = pairs;
}

// Items and lists.

template <class T>
__global__ void load_items(Work w, const T* scores, const float* labels, const uint8_t* where) {
  const int64_t i = thread_index();
  if (i >= w.num_items) return;
  int64_t list = 0;  // the first that ends after i
  for (int64_t high = w.num_lists; list < high;) {
    const int64_t middle = list + (high - list) / 2;
    if (w.offsets[middle + 1] > i)
      high = middle;
    else
      list = middle + 1;
  }
  const bool is_kept = list < w.num_lists && w.offsets[list] <= i && (!where || where[i]);
  w.items[i] = {0, 0, -1};
  if (is_kept) w.items[i] = {static_cast<float>(scores[i]), labels[i], static_cast<int32_t>(list)};
}

// A list ranks something if it has two items, and labels that differ unless they are a teacher's scores.
__global__ void describe_lists(Work w, bool is_distillation) {
  const int32_t l = blockIdx.x;
  List& list = w.lists[l];
  if (threadIdx.x == 0) {
    list.begin = min(max(w.offsets[l], int64_t{0}), w.num_items);
    list.end = min(max(w.offsets[l + 1], list.begin), w.num_items);
    list.loss = list.ideal = 0;
    list.pairs = 0;
  }
  __syncthreads();
  const double size = sum_list(w, l, [](int64_t, const Item&) { return 1.0; });
  const float highest = max_list(w, l, [](int64_t, const Item& item) { return item.label; });
  const float lowest = -max_list(w, l, [](int64_t, const Item& item) { return -item.label; });
  if (threadIdx.x) return;
  list.size = static_cast<int32_t>(size);
  list.is_ranked = size > 1 && (is_distillation || lowest < highest);
}

// Ranks.

enum class Order { kPositions, kScores, kLabels, kShuffledLabels, kSampled };

__global__ void set_keys(Work w, Order order, uint32_t sample) {
  const int64_t i = thread_index();
  if (i >= w.num_items || w.items[i].list < 0) return;
  const Item& item = w.items[i];
  const uint64_t seed = w.seed + static_cast<uint64_t>(item.list);
  if (order == Order::kPositions) {
    w.keys[i] = 0;
  } else if (order == Order::kScores) {
    w.keys[i] = descending(item.score);
  } else if (order == Order::kLabels) {
    w.keys[i] = descending(item.label);
  } else if (order == Order::kShuffledLabels) {
    w.keys[i] = uint64_t{descending(item.label)} << 32 | philox(seed, 0, w.positions[i] - 1);
  } else {  // scores with Gumbel noise, in float64 like the reference's, for the same order
    const double uniform = (philox(seed, sample, w.positions[i] - 1) + 0.5) / 4294967296.0;
    w.keys[i] = descending(item.score - log(-log(uniform)));
  }
}

// 1 + the number of keys that are lower, or (unless equal keys share a rank) equal and earlier.
__global__ void count_ranks(Work w, int32_t* ranks, bool shared) {
  const int64_t i = thread_index();
  const uint64_t mine = i < w.num_items ? w.keys[i] : 0;
  int32_t rank = 1;
  walk(
      w, [&](int64_t j) { return w.keys[j]; },
      [&](int64_t j, uint64_t key) { rank += key < mine || (key == mine && j < i && !shared); });
  if (i < w.num_items) ranks[i] = rank;
}

// Ranks must be those of the labels.
__global__ void set_ideal(Work w) {
  const int32_t l = blockIdx.x, top = top_of(w);
  const double ideal = sum_list(w, l, [&](int64_t i, const Item& item) {
    return w.ranks[i] <= top ? gain_of(item.label) * discount_of(w.ranks[i]) : 0.0f;
  });
  if (threadIdx.x == 0) w.lists[l].ideal = ideal;
}

// Sums over pairs: weight(i, j) softplus(margin - sigma (s_i - s_j)) over the pairs that count.

struct Ranked {
  float score, label;
  float gain, discount;
  int32_t rank, size;
  bool is_top;
};

template <Kind kind>
constexpr bool kIsNdcg =
    kind == Kind::kLambdaRank || kind == Kind::kNdcgLoss1 || kind == Kind::kNdcgLoss2 || kind == Kind::kNdcgLoss2pp;

template <Kind kind>
constexpr bool kIsDcg = kind == Kind::kDcgLambda || kind == Kind::kDcg2Lambda;

template <Kind kind>
__device__ Ranked ranked(const Work& w, int64_t i) {
  const Item& item = w.items[i];
  Ranked r{item.score, item.label, 0, 0, 0, 0, false};
  if constexpr (kind == Kind::kRankNet || kind == Kind::kSoftRankNet) return r;
  r.rank = w.ranks[i];
  if constexpr (kind == Kind::kWeightedRankNet || kind == Kind::kSkipRankNet) return r;
  if constexpr (kind == Kind::kLipo) {
    r.gain = exp2f(item.label);
    r.discount = 1 / logf(1 + static_cast<float>(r.rank));
    return r;
  }
  const List& list = w.lists[item.list];
  r.size = list.size;
  r.is_top = r.rank <= top_of(w);
  r.gain = gain_of(item.label);
  r.discount = discount_of(r.rank);
  if constexpr (kIsNdcg<kind>) r.gain /= fmaxf(static_cast<float>(list.ideal), 1e-10f);
  if constexpr (kIsDcg<kind>)
    if (w.settings.option != 0 && list.ideal > 0) r.gain /= static_cast<float>(list.ideal);
  if constexpr (kind == Kind::kDcgLambda)
    if (!r.is_top) r.discount = 0;
  return r;
}

// Whether i above j is a pair; `same` for i = j.
template <Kind kind>
__device__ bool is_pair(const Work& w, const Ranked& i, const Ranked& j, bool same) {
  if constexpr (kind == Kind::kSoftRankNet) return !same;
  if constexpr (kIsNdcg<kind>) {
    const bool is_kept = w.settings.option != 0 ? i.is_top || j.is_top : i.is_top && j.is_top;
    return is_kept && (kind == Kind::kNdcgLoss1 || i.label > j.label);
  }
  if constexpr (kind == Kind::kSkipRankNet) {
    const int32_t skip = abs(i.rank - j.rank);
    return i.label > j.label && (skip & (skip - 1)) == 0;
  }
  return i.label > j.label;
}

// 1 / log2(1 + d) - 1 / log2(2 + d), without the cancellation.
__device__ float discount_step(int32_t distance) {
  if (distance == 0) return 0;
  const float d = static_cast<float>(distance);
  constexpr float kLn2 = 0.693147181f;
  return kLn2 * log1pf(1 / (1 + d)) / (logf(1 + d) * logf(2 + d));
}

template <Kind kind>
__device__ float pair_weight(const Work& w, const Ranked& i, const Ranked& j) {
  if constexpr (kind == Kind::kRankNet || kind == Kind::kSkipRankNet) return 1;
  if constexpr (kind == Kind::kWeightedRankNet) return 1 / (static_cast<float>(i.rank) + static_cast<float>(j.rank));
  if constexpr (kind == Kind::kSoftRankNet) return sigmoid(i.label - j.label);
  if constexpr (kind == Kind::kNdcgLoss1) return i.gain * i.discount;
  const float gain = fabsf(i.gain - j.gain), absolute = fabsf(i.discount - j.discount) * gain;
  if constexpr (kind == Kind::kLambdaRank || kind == Kind::kLipo) return absolute;
  if constexpr (kind == Kind::kDcgLambda) return i.size * absolute;
  const float relative = discount_step(abs(i.rank - j.rank)) * gain;
  if constexpr (kind == Kind::kNdcgLoss2) return relative;
  if constexpr (kind == Kind::kNdcgLoss2pp) return static_cast<float>(w.settings.mu) * relative + absolute;
  // kDcg2Lambda
  const bool is_kept = i.is_top && j.is_top;
  return i.size * (is_kept ? relative : relative / (1 - discount_of(max(i.rank, j.rank))));
}

template <Kind kind>
__global__ void pair_losses(Work w) {
  const int64_t i = thread_index();
  const float sigma = static_cast<float>(w.settings.sigma), margin = static_cast<float>(w.settings.margin);
  Ranked mine{};
  if (i < w.num_items && w.items[i].list >= 0) mine = ranked<kind>(w, i);
  Sum loss, grad;
  int32_t pairs = 0;
  walk(
      w, [&](int64_t j) { return ranked<kind>(w, j); },
      [&](int64_t j, const Ranked& other) {
        const bool is_above = is_pair<kind>(w, mine, other, i == j), is_below = is_pair<kind>(w, other, mine, i == j);
        if (!is_above && !is_below) return;
        float x = sigma * (mine.score - other.score);
        if constexpr (kind == Kind::kSkipRankNet) x += is_above ? -margin : margin;
        const float e = expf(-fabsf(x));
        if (is_above) {
          const float weight = pair_weight<kind>(w, mine, other);
          loss.add(weight * (fmaxf(-x, 0) + log1pf(e)));
          grad.add(-weight * ((x <= 0 ? 1 : e) / (1 + e)));
          ++pairs;
        }
        if (is_below) grad.add(pair_weight<kind>(w, other, mine) * ((x >= 0 ? 1 : e) / (1 + e)));
      });
  if (i >= w.num_items) return;
  w.values[i] = loss.value();
  w.pairs[i] = pairs;
  w.grad[i] = sigma * grad.value();
}

// Lists need an ideal DCG for NDCG; both orders of a pair are one where `halved`.
__global__ void sum_pairs(Work w, bool needs_ideal, bool halved) {
  const int32_t l = blockIdx.x;
  List& list = w.lists[l];
  if (!list.is_ranked || (needs_ideal && !(list.ideal > 0))) return;
  const double loss = sum_list(w, l, [&](int64_t i, const Item&) { return w.values[i]; });
  const int64_t pairs = reduce_list(
      w, l, int64_t{0}, [](int64_t a, int64_t b) { return a + b; },
      [&](int64_t i, const Item&) { return int64_t{w.pairs[i]}; });
  set_list(list, loss, halved ? pairs / 2 : pairs);
}

// Softmax over the list.

// Cross entropy of softmax(s / T) to a target: softmax(y), y, or softmax(y / T).
template <Kind kind>
__global__ void softmax_losses(Work w) {
  const int32_t l = blockIdx.x;
  if (!w.lists[l].is_ranked) return;
  const float temperature = static_cast<float>(w.settings.temperature);
  const auto all = [](const Item&) { return true; };
  const auto logit = [=](const Item& item) { return item.score / temperature; };
  const auto label = [=](const Item& item) {
    return kind == Kind::kKlDistillation ? item.label / temperature : item.label;
  };
  const LogSum student = log_sum_list(w, l, logit, all);
  LogSum teacher{};
  float unit = 1, mass = 1;
  if constexpr (kind == Kind::kSoftmax) {
    const double sum = sum_list(w, l, [](int64_t, const Item& item) { return item.label; });
    if (sum == 0) return;
    if (w.settings.option != 0)
      unit = static_cast<float>(1 / sum);
    else
      mass = static_cast<float>(sum);
  } else {
    teacher = log_sum_list(w, l, label, all);
  }
  const auto target = [&](const Item& item) {
    return kind == Kind::kSoftmax ? unit * item.label : expf(-teacher.minus(label(item)));
  };
  // d (T^2 KL) / d (s / T) / T
  const float slope = kind == Kind::kKlDistillation ? temperature : 1 / temperature;
  const double loss = sum_list(w, l, [&](int64_t, const Item& item) {
    const float surprise = student.minus(logit(item));
    return target(item) * (kind == Kind::kKlDistillation ? surprise - teacher.minus(label(item)) : surprise);
  });
  for_each_item(w, l, [&](int64_t i, const Item& item) {
    w.grad[i] = slope * (mass * expf(-student.minus(logit(item))) - target(item));
  });
  set_list(w.lists[l], kind == Kind::kKlDistillation ? temperature * temperature * loss : loss, 1);
}

// Positives against the log-sum-exp N of the negatives: softplus(N - P) of the positives' log-sum-exp P (infonce), or
// the mean of softplus(N - logit) over the positives (decoupled_softmax).
template <Kind kind>
__global__ void contrastive_losses(Work w) {
  const int32_t l = blockIdx.x;
  if (!w.lists[l].is_ranked) return;
  const float temperature = static_cast<float>(w.settings.temperature);
  const auto logit = [=](const Item& item) { return item.score / temperature; };
  const auto is_positive = [](const Item& item) { return item.label > 0; };
  const auto is_negative = [](const Item& item) { return !(item.label > 0); };
  const double positives = sum_list(w, l, [&](int64_t, const Item& item) { return is_positive(item) ? 1.0 : 0.0; });
  if (positives == 0 || positives == w.lists[l].size) return;
  const LogSum others = log_sum_list(w, l, logit, is_negative);
  double loss, push;  // push: minus the sum of the positives' gradients, in units of 1 / T
  LogSum hits{};
  if constexpr (kind == Kind::kInfoNce) {
    hits = log_sum_list(w, l, logit, is_positive);
    const float x = (others.peak - hits.peak) + (others.log_sum - hits.log_sum);
    loss = softplus(x);
    push = sigmoid(x);
  } else {
    loss = sum_list(w, l,
                    [&](int64_t, const Item& item) {
                      return is_positive(item) ? softplus(others.minus(logit(item))) : 0.0f;
                    }) /
           positives;
    push = sum_list(w, l,
                    [&](int64_t, const Item& item) {
                      return is_positive(item) ? sigmoid(others.minus(logit(item))) : 0.0f;
                    }) /
           positives;
  }
  const float share = static_cast<float>(push / temperature);
  const float each = static_cast<float>(1 / (positives * temperature));
  for_each_item(w, l, [&](int64_t i, const Item& item) {
    if (is_negative(item))
      w.grad[i] = share * expf(-others.minus(logit(item)));
    else if (kind == Kind::kInfoNce)
      w.grad[i] = -share * expf(-hits.minus(logit(item)));
    else
      w.grad[i] = -each * sigmoid(others.minus(logit(item)));
  });
  set_list(w.lists[l], loss, 1);
}

// The first item is the positive.
__global__ void margin_mse(Work w) {
  const int32_t l = blockIdx.x;
  if (!w.lists[l].is_ranked) return;
  const int64_t first = reduce_list(
      w, l, INT64_MAX, [](int64_t a, int64_t b) { return min(a, b); }, [](int64_t i, const Item&) { return i; });
  const Item positive = w.items[first];
  const auto error = [&](const Item& item) {
    return (positive.score - item.score) - (positive.label - item.label);  // 0 for the positive itself
  };
  const double negatives = w.lists[l].size - 1;
  const double square = sum_list(w, l, [&](int64_t, const Item& item) { return error(item) * error(item); });
  const double sum = sum_list(w, l, [&](int64_t, const Item& item) { return error(item); });
  for_each_item(w, l, [&](int64_t i, const Item& item) {
    w.grad[i] = static_cast<float>(2 / negatives * (i == first ? sum : -error(item)));
  });
  set_list(w.lists[l], square / negatives, 1);
}

// -mean log z over the positives, z = sigmoid(sigma (s + t)) with t such that sum z = k, found by bisection.
__global__ void soft_topk(Work w) {
  const int32_t l = blockIdx.x;
  const double k = w.settings.k, sigma = w.settings.sigma;
  if (!w.lists[l].is_ranked || w.lists[l].size <= k) return;
  const double positives = sum_list(w, l, [](int64_t, const Item& item) { return item.label > 0 ? 1.0 : 0.0; });
  if (positives == 0) return;
  const double margin = (10 + log(static_cast<double>(w.lists[l].size))) / sigma;
  double low = -max_list(w, l, [](int64_t, const Item& item) { return item.score; }) - margin;
  double high = max_list(w, l, [](int64_t, const Item& item) { return -item.score; }) + margin;
  for (int step = 0; step < 64; ++step) {
    // sum z - k = #(u >= 0) - k + what the items of either side are short of 0 or 1. Where the count is k, that is in
    // units of the largest such part, so that a wide gap between the best k and the rest has its middle found.
    const double middle = (low + high) / 2;
    const auto u = [&](const Item& item) { return static_cast<float>(sigma * (item.score + middle)); };
    const double count = sum_list(w, l, [&](int64_t, const Item& item) { return u(item) >= 0 ? 1.0 : 0.0; });
    const float nearest =
        count == k ? -max_list(w, l, [&](int64_t, const Item& item) { return -fabsf(u(item)); }) : 0.0f;
    const double rest = sum_list(w, l, [&](int64_t, const Item& item) {
      const float size = fabsf(u(item)), part = expf(nearest - size) / (1 + expf(-size));
      return u(item) < 0 ? part : -part;
    });
    (count - k + rest >= 0 ? high : low) = middle;
  }
  const auto logit = [&](const Item& item) { return static_cast<float>(sigma * (item.score + (low + high) / 2)); };
  // d loss / d (s_i + t), then t's own change: it keeps sum z at k.
  const auto direct = [&](const Item& item) {
    return item.label > 0 ? static_cast<float>(-sigma / positives) * sigmoid(-logit(item)) : 0.0f;
  };
  const float nearest = -max_list(w, l, [&](int64_t, const Item& item) { return -fabsf(logit(item)); });
  const auto spread = [&](const Item& item) {  // z (1 - z), in units of its largest
    const float size = fabsf(logit(item)), e = expf(-size);
    return expf(nearest - size) / ((1 + e) * (1 + e));
  };
  const double loss =
      sum_list(w, l, [&](int64_t, const Item& item) { return item.label > 0 ? softplus(-logit(item)) : 0.0f; });
  const double sum_direct = sum_list(w, l, [&](int64_t, const Item& item) { return direct(item); });
  const double sum_spread = sum_list(w, l, [&](int64_t, const Item& item) { return spread(item); });
  const float shift = static_cast<float>(sum_direct / sum_spread);
  for_each_item(w, l, [&](int64_t i, const Item& item) { w.grad[i] = direct(item) - shift * spread(item); });
  set_list(w.lists[l], loss / positives, 1);
}

// Plackett-Luce: sum_i weight_i (log sum over the ranks from i's on of exp(s) - s_i).

template <Kind kind>
__device__ float rank_weight(const Work& w, int32_t rank, int32_t size) {
  if constexpr (kind == Kind::kListMle) return rank <= top_of(w) ? 1 : 0;
  if constexpr (kind == Kind::kPgRank) return 1;
  // kPListMle: 2^(n - rank) - 1, or that divided by its sum 2^n - 1 - n, both in units of 2^n for long lists.
  if (w.settings.option == 0) return ldexpf(1, size - rank) - 1;
  const float unit = ldexpf(1, -size);
  return (ldexpf(1, -rank) - unit) / (1 - (static_cast<float>(size) + 1) * unit);
}

template <Kind kind>
__global__ void set_rests(Work w) {
  const int64_t i = thread_index();
  const bool is_kept = i < w.num_items && w.items[i].list >= 0;
  const int32_t rank = is_kept ? w.ranks[i] : 0;
  struct Scored {
    float score;
    int32_t rank;
  };
  float peak = -INFINITY;
  Sum sum;
  walk(
      w, [&](int64_t j) { return Scored{w.items[j].score, w.ranks[j]}; },
      [&](int64_t, const Scored& other) {
        if (other.rank < rank) return;
        const float e = expf(-fabsf(other.score - peak));
        if (other.score > peak) {
          sum.scale(e);
          sum.add(1);
          peak = other.score;
        } else {
          sum.add(e);
        }
      });
  if (!is_kept) return;
  const LogSum rest{peak, logf(sum.value())};
  w.rests[i] = rest;
  w.values[i] = rank_weight<kind>(w, rank, w.lists[w.items[i].list].size) * rest.minus(w.items[i].score);
}

template <Kind kind>
__global__ void plackett_luce_gradients(Work w) {
  const int64_t i = thread_index();
  const bool is_kept = i < w.num_items && w.items[i].list >= 0;
  const int32_t rank = is_kept ? w.ranks[i] : 0;
  const float score = is_kept ? w.items[i].score : 0;
  struct Placed {
    LogSum rest;
    float weight;
    int32_t rank;
  };
  Sum grad;
  walk(
      w,
      [&](int64_t j) {
        const int32_t size = w.lists[w.items[j].list].size;
        return Placed{w.rests[j], rank_weight<kind>(w, w.ranks[j], size), w.ranks[j]};
      },
      [&](int64_t, const Placed& other) {
        if (other.rank <= rank) grad.add(other.weight * expf(-other.rest.minus(score)));
        if (other.rank == rank) grad.add(-other.weight);
      });
  if (is_kept) w.grad[i] = grad.value();
}

__global__ void sum_plackett_luce(Work w) {
  const int32_t l = blockIdx.x;
  if (!w.lists[l].is_ranked) return;
  const double loss = sum_list(w, l, [&](int64_t i, const Item&) { return w.values[i]; });
  set_list(w.lists[l], loss, 1);
}

// pg_rank: -mean over samples of advantage * log PL, the advantage of a sampled order being its nDCG@k minus the mean
// of the others' nDCG@k.

__global__ void set_rewards(Work w, int32_t sample) {
  const int32_t l = blockIdx.x, top = top_of(w);
  const double dcg = sum_list(w, l, [&](int64_t i, const Item& item) {
    return w.ranks[i] <= top ? gain_of(item.label) * discount_of(w.ranks[i]) : 0.0f;
  });
  if (threadIdx.x == 0) w.rewards[l * static_cast<int64_t>(w.settings.count) + sample] = dcg / w.lists[l].ideal;
}

// Adds one sample; its gradients without the advantage are in `slopes`.
__global__ void add_sample(Work w, int32_t sample) {
  const int32_t l = blockIdx.x;
  List& list = w.lists[l];
  if (!list.is_ranked || !(list.ideal > 0)) return;
  const int64_t samples = static_cast<int64_t>(w.settings.count);
  const double* rewards = w.rewards + l * samples;
  double mean = 0;
  for (int64_t s = 0; s < samples; ++s) mean += rewards[s] / samples;
  const double advantage = (rewards[sample] - mean) / (samples - 1);
  const double loss = sum_list(w, l, [&](int64_t i, const Item&) { return w.values[i]; });
  for_each_item(w, l, [&](int64_t i, const Item&) {
    w.grad[i] = (sample ? w.grad[i] : 0) + static_cast<float>(advantage) * w.slopes[i];
  });
  set_list(list, list.loss + advantage * loss, 1);
}

// Smooth ranks: R_i = 1/2 + sum_j sigmoid((s_j - s_i) / T), j = i included.

__global__ void set_smooth_ranks(Work w) {
  const int64_t i = thread_index();
  const bool is_kept = i < w.num_items && w.items[i].list >= 0;
  const float score = is_kept ? w.items[i].score : 0, temperature = static_cast<float>(w.settings.temperature);
  Sum rank;
  rank.add(0.5f);
  walk(
      w, [&](int64_t j) { return w.items[j].score; },
      [&](int64_t, float other) { rank.add(sigmoid((other - score) / temperature)); });
  if (is_kept) {
    w.values[i] = rank.value();
    w.slopes[i] = 0;  // of lists that do not count
  }
}

__global__ void approx_ndcg(Work w) {
  const int32_t l = blockIdx.x;
  List& list = w.lists[l];
  if (!list.is_ranked || !(list.ideal > 0)) return;
  const auto gain = [&](const Item& item) { return gain_of(item.label) / static_cast<float>(list.ideal); };
  const double loss = sum_list(w, l, [&](int64_t i, const Item& item) { return -gain(item) / log2f(1 + w.values[i]); });
  for_each_item(w, l, [&](int64_t i, const Item& item) {
    const float above = 1 + w.values[i], logarithm = logf(above);
    constexpr float kLn2 = 0.693147181f;
    w.slopes[i] = kLn2 * gain(item) / (above * logarithm * logarithm);
  });
  set_list(list, loss, 1);
}

__global__ void approx_mrr(Work w) {
  const int32_t l = blockIdx.x;
  List& list = w.lists[l];
  if (!list.is_ranked) return;
  if (w.settings.option != 0) {
    const double mass = sum_list(w, l, [](int64_t, const Item& item) { return fmaxf(item.label, 0); });
    if (mass == 0) return;
    const auto weight = [=](const Item& item) { return fmaxf(item.label, 0) / static_cast<float>(mass); };
    const double loss = sum_list(w, l, [&](int64_t i, const Item& item) { return -weight(item) / w.values[i]; });
    for_each_item(w, l, [&](int64_t i, const Item& item) { w.slopes[i] = weight(item) / (w.values[i] * w.values[i]); });
    set_list(list, loss, 1);
    return;
  }
  // The smooth ranks fall as scores rise.
  const float best = max_list(w, l, [](int64_t, const Item& item) { return item.label >= 1 ? item.score : -INFINITY; });
  if (best == -INFINITY) return;
  const int64_t first = reduce_list(
      w, l, INT64_MAX, [](int64_t a, int64_t b) { return min(a, b); },
      [=](int64_t i, const Item& item) { return item.label >= 1 && item.score == best ? i : INT64_MAX; });
  const float rank = w.values[first];
  for_each_item(w, l, [&](int64_t i, const Item&) { w.slopes[i] = i == first ? 1 / (rank * rank) : 0; });
  set_list(list, -1 / rank, 1);
}

__global__ void smooth_rank_gradients(Work w) {
  const int64_t i = thread_index();
  struct Sloped {
    float score, slope;
  };
  const auto load = [&](int64_t j) { return Sloped{w.items[j].score, w.slopes[j]}; };
  const bool is_kept = i < w.num_items && w.items[i].list >= 0;
  const Sloped mine = is_kept ? load(i) : Sloped{};
  const float temperature = static_cast<float>(w.settings.temperature);
  Sum grad;
  walk(w, load, [&](int64_t, const Sloped& other) {
    const float e = expf(-fabsf(other.score - mine.score) / temperature);
    grad.add((other.slope - mine.slope) * (e / ((1 + e) * (1 + e))));
  });
  if (is_kept) w.grad[i] = grad.value() / temperature;
}

// From sums over lists to the loss.

__global__ void finish_lists(Work w) {
  const int64_t l = thread_index();
  if (l >= w.num_lists) return;
  List& list = w.lists[l];
  const double divisor = w.settings.divisor == 1 ? list.pairs : w.settings.divisor == 2 ? list.size : 1;
  list.scale = list.pairs > 0 ? w.settings.unit / divisor : 0;
  list.loss *= list.scale;
  if (w.reduction == ListwiseReduction::kNone) w.loss[l] = static_cast<float>(list.loss);
}

__global__ void finish_batch(Work w) {
  double loss = 0, count = 0;
  for (int64_t l = threadIdx.x; l < w.num_lists; l += kBlock) {
    loss += w.lists[l].loss;
    if (w.reduction == ListwiseReduction::kMean) count += w.lists[l].pairs > 0;
    if (w.reduction == ListwiseReduction::kPairMean) count += w.lists[l].pairs;
  }
  const auto plus = [](double a, double b) { return a + b; };
  loss = block_reduce(loss, plus);
  count = block_reduce(count, plus);
  if (threadIdx.x) return;
  *w.batch_scale = 1 / fmax(count, 1.0);
  if (w.reduction != ListwiseReduction::kNone) *w.loss = static_cast<float>(*w.batch_scale * loss);
}

__global__ void finish_items(Work w) {
  const int64_t i = thread_index();
  if (i >= w.num_items) return;
  const int32_t l = w.items[i].list;
  const bool contributes = l >= 0 && w.lists[l].pairs > 0;
  w.grad[i] = contributes ? static_cast<float>(w.grad[i] * (w.lists[l].scale * *w.batch_scale)) : 0;
}

// Hands out the arrays of the workspace one after the other; from null, counts their bytes.
class Arrays {
 public:
  explicit Arrays(void* memory) : begin_(static_cast<char*>(memory)) {}
  template <class T>
  void take(T*& array, int64_t count) {
    if (begin_) array = reinterpret_cast<T*>(begin_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* begin_;
  size_t bytes_ = 0;
};

size_t divide(Work& w, const ListwiseArgs& args, void* memory) {
  Arrays arrays(memory);
  arrays.take(w.items, args.num_items);
  arrays.take(w.keys, args.num_items);
  arrays.take(w.ranks, args.num_items);
  arrays.take(w.positions, args.num_items);
  arrays.take(w.pairs, args.num_items);
  arrays.take(w.values, args.num_items);
  arrays.take(w.slopes, args.num_items);
  arrays.take(w.rests, args.num_items);
  arrays.take(w.lists, args.num_lists);
  arrays.take(w.rewards, args.kind == Kind::kPgRank ? args.num_lists * static_cast<int64_t>(args.settings.count) : 0);
  arrays.take(w.batch_scale, 1);
  return arrays.bytes();
}

// The kernels of one call, in their order.
class Launches {
 public:
  Launches(const Work& w, cudaStream_t stream) : w_(w), stream_(stream) {}

  void load(const ListwiseArgs& args) {
    if (args.dtype == DType::kFloat32)
      per_item(load_items<float>, static_cast<const float*>(args.scores), args.labels, args.where);
    else if (args.dtype == DType::kBFloat16)
      per_item(load_items<__nv_bfloat16>, static_cast<const __nv_bfloat16*>(args.scores), args.labels, args.where);
    else
      per_item(load_items<__half>, static_cast<const __half*>(args.scores), args.labels, args.where);
    const bool is_distillation =
        args.kind == Kind::kSoftRankNet || args.kind == Kind::kKlDistillation || args.kind == Kind::kMarginMse;
    per_list(describe_lists, is_distillation);
  }

  void losses(Kind kind) {
    switch (kind) {
      case Kind::kRankNet:
        return pairs<Kind::kRankNet>();
      case Kind::kWeightedRankNet:
        if (w_.settings.option != 0)
          rank(Order::kScores);
        else
          rank(Order::kLabels, 0, true);  // so that the order of the items does not matter
        return pairs<Kind::kWeightedRankNet>();
      case Kind::kSoftRankNet:
        return pairs<Kind::kSoftRankNet>();
      case Kind::kLambdaRank:
        return gained_pairs<Kind::kLambdaRank>();
      case Kind::kNdcgLoss1:
        return gained_pairs<Kind::kNdcgLoss1>();
      case Kind::kNdcgLoss2:
        return gained_pairs<Kind::kNdcgLoss2>();
      case Kind::kNdcgLoss2pp:
        return gained_pairs<Kind::kNdcgLoss2pp>();
      case Kind::kLipo:
        rank(Order::kScores);
        return pairs<Kind::kLipo>();
      case Kind::kDcgLambda:
        return gained_pairs<Kind::kDcgLambda>();
      case Kind::kDcg2Lambda:
        return gained_pairs<Kind::kDcg2Lambda>();
      case Kind::kSkipRankNet:
        rank(Order::kLabels);
        return pairs<Kind::kSkipRankNet>();
      case Kind::kListNet:
        return per_list(softmax_losses<Kind::kListNet>);
      case Kind::kSoftmax:
        return per_list(softmax_losses<Kind::kSoftmax>);
      case Kind::kInfoNce:
        return per_list(contrastive_losses<Kind::kInfoNce>);
      case Kind::kDecoupledSoftmax:
        return per_list(contrastive_losses<Kind::kDecoupledSoftmax>);
      case Kind::kKlDistillation:
        return per_list(softmax_losses<Kind::kKlDistillation>);
      case Kind::kMarginMse:
        return per_list(margin_mse);
      case Kind::kListMle:
        if (w_.settings.option != 0) count_positions();
        rank(w_.settings.option != 0 ? Order::kShuffledLabels : Order::kLabels);
        plackett_luce<Kind::kListMle>();
        return per_list(sum_plackett_luce);
      case Kind::kPListMle:
        rank(Order::kLabels);
        plackett_luce<Kind::kPListMle>();
        return per_list(sum_plackett_luce);
      case Kind::kPgRank:
        return pg_rank();
      case Kind::kApproxNdcg:
        ideal();
        per_item(set_smooth_ranks);
        per_list(approx_ndcg);
        return per_item(smooth_rank_gradients);
      case Kind::kApproxMrr:
        per_item(set_smooth_ranks);
        per_list(approx_mrr);
        return per_item(smooth_rank_gradients);
      case Kind::kSoftTopK:
        return per_list(soft_topk);
      case Kind::kNeuralNdcg:
      case Kind::kGroCo:
        return;
    }
  }

  void finish() {
    launch(finish_lists, blocks_of(w_.num_lists));
    launch(finish_batch, 1);
    per_item(finish_items);
  }

 private:
  static int64_t blocks_of(int64_t threads) { return (threads + kBlock - 1) / kBlock; }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Work, Parameters...), int64_t blocks, Arguments... arguments) {
    if (blocks > 0) RANKERNEL_LAUNCH(kernel, static_cast<unsigned>(blocks), kBlock, stream_, w_, arguments...);
  }
  template <class... Parameters, class... Arguments>
  void per_item(void (*kernel)(Work, Parameters...), Arguments... arguments) {
    launch(kernel, blocks_of(w_.num_items), arguments...);
  }
  template <class... Parameters, class... Arguments>
  void per_list(void (*kernel)(Work, Parameters...), Arguments... arguments) {
    launch(kernel, w_.num_lists, arguments...);
  }

  void rank(Order order, int64_t sample = 0, bool shared = false) {
    per_item(set_keys, order, static_cast<uint32_t>(sample));
    per_item(count_ranks, w_.ranks, shared);
  }
  void count_positions() {
    per_item(set_keys, Order::kPositions, 0u);
    per_item(count_ranks, w_.positions, false);
  }
  void ideal() {
    rank(Order::kLabels);
    per_list(set_ideal);
  }

  template <Kind kind>
  void pairs() {
    per_item(pair_losses<kind>);
    per_list(sum_pairs, kIsNdcg<kind>, kind == Kind::kSoftRankNet);
  }
  template <Kind kind>
  void gained_pairs() {
    ideal();
    rank(Order::kScores);
    pairs<kind>();
  }
  template <Kind kind>
  void plackett_luce() {
    per_item(set_rests<kind>);
    per_item(plackett_luce_gradients<kind>);
  }

  void pg_rank() {
    const int64_t samples = static_cast<int64_t>(w_.settings.count);
    ideal();
    count_positions();
    for (int64_t sample = 0; sample < samples; ++sample) {
      rank(Order::kSampled, sample);
      per_list(set_rewards, static_cast<int32_t>(sample));
    }
    // Every sampled order a second time: keeping them all would take samples times the memory.
    Work one_sample = w_;
    one_sample.grad = w_.slopes;
    for (int64_t sample = 0; sample < samples; ++sample) {
      rank(Order::kSampled, sample);
      Launches(one_sample, stream_).plackett_luce<Kind::kPgRank>();
      per_list(add_sample, static_cast<int32_t>(sample));
    }
  }

  Work w_;
  cudaStream_t stream_;
};

}  // namespace

bool covers(ListwiseKind kind) { return kind != Kind::kNeuralNdcg && kind != Kind::kGroCo; }

size_t listwise_loss_workspace(const ListwiseArgs& args) {
  Work w{};
  return divide(w, args, nullptr);
}

int listwise_loss(const ListwiseArgs& args, void* workspace, void* stream) {
  // A block a list and a 32-bit number for every list and every item of one.
  if (args.num_items > INT_MAX || args.num_lists > INT_MAX || !covers(args.kind)) return cudaErrorInvalidValue;
  Work w{};
  w.offsets = args.offsets;
  w.num_items = args.num_items;
  w.num_lists = args.num_lists;
  w.reduction = args.reduction;
  w.settings = args.settings;
  w.seed = args.seed;
  w.loss = args.loss;
  w.grad = args.grad;
  divide(w, args, workspace);
  Launches launches(w, static_cast<cudaStream_t>(stream));
  launches.load(args);
  launches.losses(args.kind);
  launches.finish();
  return cudaGetLastError();
}

}  // namespace rankernel::cuda
