// One list after another: its valid items are packed, sorted where the kind needs it, and its loss and gradient come
// from one or two passes over its pairs or its items. Short lists are shared out among threads; a long one is cut into
// parts that depend on its length alone. So neither the threads nor the other lists of a batch change a bit of a list's
// result.

#include "../listwise_loss.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "dispatch.h"
#include "ordering.h"

namespace rankernel {
namespace {

#include "simd/element.h"

constexpr int64_t kLongList = 4096;     // from here on several threads work on one list
constexpr int64_t kPairParts = 16;      // of a long list's rows, each with its own sums
constexpr int64_t kScanPart = 1 << 14;  // items of a Plackett-Luce list per part
constexpr int64_t kScanBlock = 128;     // items that share a maximum
constexpr double kScanRange = 60.0;     // and whose exponentials may be this far apart, in units of log e
constexpr int64_t kStoredMatrix = 128;  // items of a list whose NeuralSort matrix, 64 KiB, is kept for its passes
constexpr double kSerialWork = 4e4;     // pairs or so that are not worth waking threads for
constexpr double kLeast = 1e-10;        // smallest ideal DCG that is divided by, as published
constexpr double kLeastColumn = 1e-30;  // a column that rounding has emptied stays empty, and finite

// One list's valid items, in their order. Arrays have padding behind them.
struct List {
  int64_t n;
  const float* scores;
  const float* labels;
  uint64_t seed;
  int num_threads;
};

// pairs = 0: the list ranks nothing.
struct Result {
  double loss = 0.0;
  int64_t pairs = 0;
};

struct Context {
  const ListwiseArgs& args;
  const ListwiseSettings& settings;
  ListwiseKernels kernels;
};

// Everything that a kind computes for one list. grad starts at zero and gets the gradient with respect to the scores.
using ListFunction = Result (*)(const Context&, const List&, Arena&, double* grad);

float* take_floats(Arena& arena, int64_t n, float padding = 0.0f) {
  float* const p = arena.take<float>(n + kPadding);
  std::fill_n(p + n, kPadding, padding);
  return p;
}

constexpr float kInertScore = -std::numeric_limits<float>::infinity();

// 1 / log2(1 + rank), from a table for the ranks that occur.
double discount(int64_t rank) {
  constexpr int64_t kTable = 1024;
  static const std::vector<double> table = [] {
    std::vector<double> values(kTable);
    for (int64_t r = 1; r < kTable; ++r) values[static_cast<size_t>(r)] = 1.0 / std::log2(1.0 + static_cast<double>(r));
    return values;
  }();
  return rank < kTable ? table[static_cast<size_t>(rank)] : 1.0 / std::log2(1.0 + static_cast<double>(rank));
}

int64_t cutoff(const Context& c, int64_t n) {
  return c.settings.k > 0 ? std::min(static_cast<int64_t>(c.settings.k), n) : n;
}

const int32_t* order_of(const Context& c, const float* values, const List& list, Arena& arena) {
  int32_t* const order = arena.take<int32_t>(list.n);
  order_descending(values, list.n, list.num_threads, c.kernels.count_ranks, arena, order);
  return order;
}

float* gather(const float* values, const int32_t* order, int64_t n, Arena& arena, float padding = 0.0f) {
  float* const out = take_floats(arena, n, padding);
  for (int64_t i = 0; i < n; ++i) out[i] = values[order[i]];
  return out;
}

// Items in the order of their labels: the pairs in which item i is the better one are (i, j), j >= first[i].
struct ByLabel {
  const int32_t* order;
  const float *scores, *labels;
  const int32_t* first;
  int64_t pairs;
};

ByLabel by_label(const Context& c, const List& list, Arena& arena) {
  const int32_t* const order = order_of(c, list.labels, list, arena);
  const float* const labels = gather(list.labels, order, list.n, arena);
  int32_t* const first = arena.take<int32_t>(list.n);
  int64_t pairs = 0;
  for (int64_t i = list.n - 1; i >= 0; --i) {
    first[i] = i + 1 < list.n && labels[i + 1] == labels[i] ? first[i + 1] : static_cast<int32_t>(i + 1);
    pairs += list.n - first[i];
  }
  return {order, gather(list.scores, order, list.n, arena, kInertScore), labels, first, pairs};
}

// Every pair once.
const int32_t* all_pairs(int64_t n, Arena& arena) {
  int32_t* const first = arena.take<int32_t>(n);
  for (int64_t i = 0; i < n; ++i) first[i] = static_cast<int32_t>(i + 1);
  return first;
}

// 2^label - 1 of labels that fall; labels below 0 gain nothing.
double* gains_of(const float* labels, int64_t n, Arena& arena) {
  double* const gains = arena.take<double>(n);
  for (int64_t i = 0; i < n; ++i)
    gains[i] = i > 0 && labels[i] == labels[i - 1] ? gains[i - 1] : std::exp2(std::max(labels[i], 0.0f)) - 1.0;
  return gains;
}

double ideal_dcg(const double* falling_gains, int64_t k) {
  double sum = 0.0;
  for (int64_t r = 0; r < k; ++r) sum += falling_gains[r] * discount(r + 1);
  return sum;
}

// Items in the order of their labels, what each place gains, and the DCG of the first k.
struct IdealOrder {
  const int32_t* items;
  const double* gains;
  double dcg;
};

IdealOrder ideal_order(const Context& c, const List& list, int64_t k, Arena& arena) {
  const int32_t* const order = order_of(c, list.labels, list, arena);
  const double* const gains = gains_of(gather(list.labels, order, list.n, arena), list.n, arena);
  return {order, gains, ideal_dcg(gains, k)};
}

// Rank by score, from 1, of the items in the order of their labels.
float* predicted_ranks(const Context& c, const List& list, const ByLabel& sorted, Arena& arena) {
  const int32_t* const order = order_of(c, list.scores, list, arena);
  float* const rank_of_item = take_floats(arena, list.n);
  for (int64_t r = 0; r < list.n; ++r) rank_of_item[order[r]] = static_cast<float>(r + 1);
  return gather(rank_of_item, sorted.order, list.n, arena);
}

// sums[i] of the task's pairs; returns their loss. Long lists are cut into parts of about equally many pairs.
double run_pairs(const Context& c, const PairTask& task, int num_threads, Arena& arena, double* sums) {
  const int64_t n = task.num_items;
  std::fill_n(sums, n, 0.0);
  if (n <= kLongList) return c.kernels.pairs(task, 0, n, sums);
  int64_t bounds[kPairParts + 1] = {0}, total = 0, seen = 0, part = 1;
  for (int64_t i = 0; i < n; ++i) total += n - task.first[i];
  for (int64_t i = 0; i < n; ++i) {
    while (part < kPairParts && seen >= total / kPairParts * part) bounds[part++] = i;
    seen += n - task.first[i];
  }
  while (part <= kPairParts) bounds[part++] = n;
  double losses[kPairParts];
  double* const parts = arena.take<double>(kPairParts * n);
  parallel_for(num_threads, kPairParts, [&](int64_t p) {
    std::fill_n(parts + p * n, n, 0.0);
    losses[p] = c.kernels.pairs(task, bounds[p], bounds[p + 1], parts + p * n);
  });
  double loss = 0.0;
  for (int64_t p = 0; p < kPairParts; ++p) {
    loss += losses[p];
    for (int64_t i = 0; i < n; ++i) sums[i] += parts[p * n + i];
  }
  return loss;
}

PairTask pair_task(const Context& c, PairTerm term, const List& list, const ByLabel& sorted) {
  PairTask task{};
  task.term = term;
  task.num_items = list.n;
  task.sigma = static_cast<float>(c.settings.sigma);
  task.scores = sorted.scores;
  task.first = sorted.first;
  return task;
}

Result pair_loss(const Context& c, const PairTask& task, const List& list, const ByLabel& sorted, int64_t pairs,
                 Arena& arena, double* grad) {
  if (pairs == 0) return {};
  double* const sums = arena.take<double>(list.n);
  const double loss = run_pairs(c, task, list.num_threads, arena, sums);
  for (int64_t i = 0; i < list.n; ++i) grad[sorted.order[i]] = c.settings.sigma * sums[i];
  return {loss, pairs};
}

// exp(sigma (s - middle)) and exp(-sigma (s - middle)): e^-x of a pair is a product of two. Only where the scores lie
// within limit / sigma of each other, else null. The exponents' rounding errors are put back as factors, so that a
// product is as accurate as the exponential of the difference.
struct Exponentials {
  float *up = nullptr, *down = nullptr;
  double range = 0.0;
};

Exponentials exponentials_of(const Context& c, const float* scores, int64_t n, double sigma, double limit,
                             Arena& arena) {
  Exponentials result;
  float low, high;
  c.kernels.extent(scores, n, &low, &high);
  result.range = sigma * (static_cast<double>(high) - static_cast<double>(low));
  if (!(result.range <= limit)) return result;
  const double middle = (static_cast<double>(high) + static_cast<double>(low)) / 2;
  float *const exponents = take_floats(arena, n), *const rests = take_floats(arena, n);
  result.up = take_floats(arena, n);
  result.down = take_floats(arena, n);
  for (int64_t i = 0; i < n; ++i) {
    const double exact = sigma * (static_cast<double>(scores[i]) - middle);
    exponents[i] = static_cast<float>(exact);
    rests[i] = static_cast<float>(exact - static_cast<double>(exponents[i]));
  }
  c.kernels.exponentials(exponents, n, 0.0f, 1.0f, result.up);
  for (int64_t i = 0; i < n; ++i) {
    result.up[i] += result.up[i] * rests[i];
    result.down[i] = 1.0f / result.up[i];
  }
  return result;
}

Result ranknet(const Context& c, const List& list, Arena& arena, double* grad) {
  const ByLabel sorted = by_label(c, list, arena);
  PairTask task = pair_task(c, PairTerm::kOne, list, sorted);
  // Four factors of at most 1 + e^20 fit a float.
  constexpr double kLimit = 20.0, kFloatBits = 120.0;
  const Exponentials e = exponentials_of(c, sorted.scores, list.n, c.settings.sigma, kLimit, arena);
  if (e.up) {
    task.term = PairTerm::kOneByProduct;
    task.a = e.up;
    task.b = e.down;
    task.terms_per_log = static_cast<int64_t>(kFloatBits / (4.0 * std::log2(1.0 + std::exp(e.range))));
  }
  return pair_loss(c, task, list, sorted, sorted.pairs, arena, grad);
}

Result weighted_ranknet(const Context& c, const List& list, Arena& arena, double* grad) {
  const ByLabel sorted = by_label(c, list, arena);
  PairTask task = pair_task(c, PairTerm::kInverseRanks, list, sorted);
  if (c.settings.option != 0.0) {
    task.a = predicted_ranks(c, list, sorted, arena);
  } else {  // of the labels; equal ones share the best
    float* const ranks = take_floats(arena, list.n);
    for (int64_t i = 0; i < list.n; ++i)
      ranks[i] = i > 0 && sorted.labels[i] == sorted.labels[i - 1] ? ranks[i - 1] : static_cast<float>(i + 1);
    task.a = ranks;
  }
  return pair_loss(c, task, list, sorted, sorted.pairs, arena, grad);
}

Result soft_ranknet(const Context& c, const List& list, Arena& arena, double* grad) {
  ByLabel sorted = by_label(c, list, arena);
  sorted.first = all_pairs(list.n, arena);
  PairTask task = pair_task(c, PairTerm::kSoft, list, sorted);
  task.a = sorted.labels;
  return pair_loss(c, task, list, sorted, list.n * (list.n - 1) / 2, arena, grad);
}

// table[d] = 1 / log2(1 + d) - 1 / log2(2 + d), table[0] = 0
const float* relative_discounts(int64_t n, Arena& arena) {
  float* const table = take_floats(arena, n);
  table[0] = 0.0f;
  for (int64_t d = 1; d < n; ++d) table[d] = static_cast<float>(discount(d) - discount(d + 1));
  return table;
}

// Pairs whose two items, or one of them, are inside; of the items behind first[i] that is a suffix count.
int64_t count_pairs(const float* inside, const int32_t* first, int64_t n, bool either, Arena& arena) {
  int64_t* const inside_from = arena.take<int64_t>(n + 1);
  inside_from[n] = 0;
  for (int64_t i = n - 1; i >= 0; --i) inside_from[i] = inside_from[i + 1] + (inside[i] != 0.0f);
  int64_t pairs = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (inside[i] != 0.0f)
      pairs += either ? n - first[i] : inside_from[first[i]];
    else if (either)
      pairs += inside_from[first[i]];
  }
  return pairs;
}

Result ndcg_weighted(const Context& c, const List& list, Arena& arena, double* grad) {
  const ListwiseSettings& settings = c.settings;
  const bool first_loss = c.args.kind == ListwiseKind::kNdcgLoss1, either = settings.option != 0.0;
  ByLabel sorted = by_label(c, list, arena);
  if (first_loss) sorted.first = all_pairs(list.n, arena);
  const PairTerm term = first_loss                                 ? PairTerm::kBothWays
                        : c.args.kind == ListwiseKind::kLambdaRank ? PairTerm::kAbsolute
                        : c.args.kind == ListwiseKind::kNdcgLoss2  ? PairTerm::kRelative
                                                                   : PairTerm::kCombined;
  const int64_t n = list.n, k = cutoff(c, n);
  const double* const gains = gains_of(sorted.labels, n, arena);
  const double ideal = ideal_dcg(gains, k);
  if (!(ideal > 0.0)) return {};
  const float* const ranks = predicted_ranks(c, list, sorted, arena);
  float *const a = take_floats(arena, n), *const b = take_floats(arena, n), *const inside = take_floats(arena, n);
  int64_t num_inside = 0;
  double diagonal = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double gain = gains[i] / std::max(ideal, kLeast), d = discount(static_cast<int64_t>(ranks[i]));
    a[i] = static_cast<float>(first_loss ? gain * d : gain);
    b[i] = static_cast<float>(d);
    inside[i] = ranks[i] <= static_cast<float>(k) ? 1.0f : 0.0f;
    num_inside += inside[i] != 0.0f;
    if (first_loss && inside[i] != 0.0f) diagonal += gain * d * std::log(2.0);  // softplus(0): an item against itself
  }
  PairTask task = pair_task(c, term, list, sorted);
  task.a = a;
  task.b = b;
  task.c = ranks;
  task.inside = inside;
  task.cut = either ? PairCut::kEither : PairCut::kBoth;
  task.mu = static_cast<float>(settings.mu);
  task.table = relative_discounts(n, arena);
  int64_t pairs;
  if (first_loss)
    pairs = either ? n * n - (n - num_inside) * (n - num_inside) : num_inside * num_inside;
  else
    pairs = count_pairs(inside, sorted.first, n, either, arena);
  Result result = pair_loss(c, task, list, sorted, pairs, arena, grad);
  result.loss += diagonal;
  return result;
}

Result lipo(const Context& c, const List& list, Arena& arena, double* grad) {
  const ByLabel sorted = by_label(c, list, arena);
  const float* const ranks = predicted_ranks(c, list, sorted, arena);
  float *const a = take_floats(arena, list.n), *const b = take_floats(arena, list.n);
  float* const inside = take_floats(arena, list.n);
  for (int64_t i = 0; i < list.n; ++i) {
    a[i] = i > 0 && sorted.labels[i] == sorted.labels[i - 1] ? a[i - 1] : std::exp2(sorted.labels[i]);
    b[i] = static_cast<float>(discount(static_cast<int64_t>(ranks[i])) / std::log(2.0));  // 1 / ln(1 + rank)
    inside[i] = 1.0f;
  }
  PairTask task = pair_task(c, PairTerm::kAbsolute, list, sorted);
  task.a = a;
  task.b = b;
  task.inside = inside;
  return pair_loss(c, task, list, sorted, sorted.pairs, arena, grad);
}

Result dcg_lambda(const Context& c, const List& list, Arena& arena, double* grad) {
  const bool relative = c.args.kind == ListwiseKind::kDcg2Lambda;
  const ByLabel sorted = by_label(c, list, arena);
  const int64_t n = list.n, k = cutoff(c, n);
  const double* const gains = gains_of(sorted.labels, n, arena);
  const double ideal = ideal_dcg(gains, k);
  const double scale = static_cast<double>(n) / (c.settings.option != 0.0 && ideal > 0.0 ? ideal : 1.0);
  const float* const ranks = predicted_ranks(c, list, sorted, arena);
  float *const a = take_floats(arena, n), *const b = take_floats(arena, n), *const inside = take_floats(arena, n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t rank = static_cast<int64_t>(ranks[i]);
    a[i] = static_cast<float>(scale * gains[i]);
    inside[i] = 1.0f;
    if (relative)  // rank 1 is never the worse of a pair
      b[i] = rank > k ? static_cast<float>(1.0 / (1.0 - discount(std::max<int64_t>(rank, 2)))) : 1.0f;
    else
      b[i] = rank > k ? 0.0f : static_cast<float>(discount(rank));
  }
  PairTask task = pair_task(c, relative ? PairTerm::kReweighted : PairTerm::kAbsolute, list, sorted);
  task.a = a;
  task.b = b;
  task.c = ranks;
  task.inside = inside;
  task.table = relative_discounts(n, arena);
  return pair_loss(c, task, list, sorted, sorted.pairs, arena, grad);
}

Result skip_ranknet(const Context& c, const List& list, Arena& arena, double* grad) {
  const ByLabel sorted = by_label(c, list, arena);
  const int64_t n = list.n;
  const float sigma = static_cast<float>(c.settings.sigma), margin = static_cast<float>(c.settings.margin);
  float *const x = take_floats(arena, n), *const softplus = take_floats(arena, n);
  float* const sigmoid = take_floats(arena, n);
  Result result;
  for (int64_t skip = 1; skip < n; skip *= 2) {
    for (int64_t i = 0; i + skip < n; ++i) x[i] = sigma * (sorted.scores[i] - sorted.scores[i + skip]) - margin;
    c.kernels.logistic(x, n - skip, softplus, sigmoid);
    for (int64_t i = 0; i + skip < n; ++i) {
      if (i + skip < sorted.first[i]) continue;
      result.loss += static_cast<double>(softplus[i]);
      ++result.pairs;
      const double slope = c.settings.sigma * static_cast<double>(sigmoid[i]);
      grad[sorted.order[i]] -= slope;
      grad[sorted.order[i + skip]] += slope;
    }
  }
  return result;
}

// softmax(x / temperature): its exponentials relative to the largest, their sum, and the log-sum-exp.
struct Softmax {
  float* exponentials;
  double sum, maximum, lse;
};

Softmax softmax_of(const Context& c, const float* x, int64_t n, Arena& arena) {
  Softmax s{take_floats(arena, n), 0.0, 0.0, 0.0};
  const float maximum = *std::max_element(x, x + n);
  s.sum = c.kernels.exponentials(x, n, maximum, static_cast<float>(1.0 / c.settings.temperature), s.exponentials);
  s.maximum = static_cast<double>(maximum) / c.settings.temperature;
  s.lse = s.maximum + std::log(s.sum);
  return s;
}

// -sum_i p_i log softmax(s / T)_i; the p_i sum to `total`. grad = (total q - p) / T.
double cross_entropy(const Context& c, const List& list, const double* p, double total, Arena& arena, double* grad) {
  const Softmax q = softmax_of(c, list.scores, list.n, arena);
  const double log_sum = std::log(q.sum), inverse = 1.0 / c.settings.temperature;
  double loss = 0.0;
  for (int64_t i = 0; i < list.n; ++i) {
    if (p[i] != 0.0) loss += p[i] * (log_sum + q.maximum - static_cast<double>(list.scores[i]) * inverse);
    grad[i] = (total * static_cast<double>(q.exponentials[i]) / q.sum - p[i]) * inverse;
  }
  return loss;
}

Result listnet(const Context& c, const List& list, Arena& arena, double* grad) {
  double* const p = arena.take<double>(list.n);
  const float maximum = *std::max_element(list.labels, list.labels + list.n);
  double sum = 0.0;
  for (int64_t i = 0; i < list.n; ++i) sum += p[i] = std::exp(static_cast<double>(list.labels[i] - maximum));
  for (int64_t i = 0; i < list.n; ++i) p[i] /= sum;
  return {cross_entropy(c, list, p, 1.0, arena, grad), 1};
}

Result softmax(const Context& c, const List& list, Arena& arena, double* grad) {
  double* const p = arena.take<double>(list.n);
  double total = 0.0;
  for (int64_t i = 0; i < list.n; ++i) total += p[i] = static_cast<double>(list.labels[i]);
  if (total == 0.0) return {};
  if (c.settings.option != 0.0) {
    for (int64_t i = 0; i < list.n; ++i) p[i] /= total;
    total = 1.0;
  }
  return {cross_entropy(c, list, p, total, arena, grad), 1};
}

// Scores of the positives, then those of the others, and where each came from.
struct Split {
  int64_t num_positives, num_others;
  float *positives, *others;
  int32_t *positive_index, *other_index;
};

Split split(const List& list, Arena& arena) {
  Split s{0,
          0,
          take_floats(arena, list.n),
          take_floats(arena, list.n),
          arena.take<int32_t>(list.n),
          arena.take<int32_t>(list.n)};
  for (int64_t i = 0; i < list.n; ++i) {
    const bool positive = list.labels[i] > 0.0f;
    int64_t& count = positive ? s.num_positives : s.num_others;
    (positive ? s.positives : s.others)[count] = list.scores[i];
    (positive ? s.positive_index : s.other_index)[count++] = static_cast<int32_t>(i);
  }
  return s;
}

double sigmoid(double x) { return x < 0.0 ? std::exp(x) / (1.0 + std::exp(x)) : 1.0 / (1.0 + std::exp(-x)); }
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

Result infonce(const Context& c, const List& list, Arena& arena, double* grad) {
  const Split s = split(list, arena);
  if (s.num_positives == 0 || s.num_others == 0) return {};
  // LSE of all - LSE of the positives = softplus(LSE of the others - LSE of the positives), which does not cancel.
  const Softmax positives = softmax_of(c, s.positives, s.num_positives, arena);
  const Softmax others = softmax_of(c, s.others, s.num_others, arena);
  const double x = others.lse - positives.lse, slope = sigmoid(x) / c.settings.temperature;
  for (int64_t i = 0; i < s.num_positives; ++i)
    grad[s.positive_index[i]] = -slope * static_cast<double>(positives.exponentials[i]) / positives.sum;
  for (int64_t i = 0; i < s.num_others; ++i)
    grad[s.other_index[i]] = slope * static_cast<double>(others.exponentials[i]) / others.sum;
  return {softplus(x), 1};
}

Result decoupled_softmax(const Context& c, const List& list, Arena& arena, double* grad) {
  const Split s = split(list, arena);
  if (s.num_positives == 0 || s.num_others == 0) return {};
  const Softmax others = softmax_of(c, s.others, s.num_others, arena);
  const double inverse = 1.0 / c.settings.temperature;
  double loss = 0.0, slopes = 0.0;
  for (int64_t i = 0; i < s.num_positives; ++i) {
    const double x = others.lse - static_cast<double>(s.positives[i]) * inverse;
    const double slope = sigmoid(x) * inverse / static_cast<double>(s.num_positives);
    loss += softplus(x);
    slopes += slope;
    grad[s.positive_index[i]] = -slope;
  }
  for (int64_t i = 0; i < s.num_others; ++i)
    grad[s.other_index[i]] = slopes * static_cast<double>(others.exponentials[i]) / others.sum;
  return {loss / static_cast<double>(s.num_positives), 1};
}

Result kl_distillation(const Context& c, const List& list, Arena& arena, double* grad) {
  const Softmax teacher = softmax_of(c, list.labels, list.n, arena);
  const Softmax student = softmax_of(c, list.scores, list.n, arena);
  const double temperature = c.settings.temperature;
  double loss = 0.0;
  for (int64_t i = 0; i < list.n; ++i) {
    const double p = static_cast<double>(teacher.exponentials[i]) / teacher.sum;
    const double q = static_cast<double>(student.exponentials[i]) / student.sum;
    const double log_p = static_cast<double>(list.labels[i]) / temperature - teacher.lse;
    const double log_q = static_cast<double>(list.scores[i]) / temperature - student.lse;
    if (p != 0.0) loss += p * (log_p - log_q);
    grad[i] = temperature * (q - p);
  }
  return {temperature * temperature * loss, 1};
}

Result margin_mse(const Context&, const List& list, Arena&, double* grad) {
  const double count = static_cast<double>(list.n - 1);
  double loss = 0.0;
  for (int64_t i = 1; i < list.n; ++i) {
    const double margin = static_cast<double>(list.scores[0]) - static_cast<double>(list.scores[i]);
    const double target = static_cast<double>(list.labels[0]) - static_cast<double>(list.labels[i]);
    loss += (margin - target) * (margin - target) / count;
    grad[i] = -2.0 * (margin - target) / count;
    grad[0] -= grad[i];
  }
  return {loss, 1};
}

// sum_k w_k (log sum_{j >= k} exp(s_j) - s_k) over scores s in the order drawn, and its gradient
//   g_m = exp(s_m) sum_{k <= m} w_k / S_k - w_m,   S_k = sum_{j >= k} exp(s_j).
// Exponentials are taken relative to a maximum that blocks of items share: the largest score from the block to the end.
// A block ends where its own scores would be so far below that maximum that S_k could underflow; within one, a ratio of
// two sums never does. `scaled` sums carried from block to block only shrink.
class PlackettLuce {
 public:
  PlackettLuce(const Context& c, const float* scores, int64_t n, int num_threads, Arena& arena)
      : c_(c),
        s_(scores),
        n_(n),
        num_threads_(num_threads),
        e_(take_floats(arena, n)),
        sums_(arena.take<double>(n)),
        shift_(arena.take<float>(n)) {}

  // weight(k) of the k-th place, from 0. Adds factor times the gradient to grad[order[m]], and returns the loss.
  template <class Weight>
  double run(Weight weight, double factor, const int32_t* order, Arena& arena, double* grad) {
    const int64_t parts = (n_ + kScanPart - 1) / kScanPart;
    const int threads = static_cast<int>(std::min<int64_t>(num_threads_, parts));
    Scaled* const carries = arena.take<Scaled>(parts + 1);
    double* const losses = arena.take<double>(parts);
    // What lies behind each part: its own sum first, then added up from the end.
    parallel_for(threads, parts, [&](int64_t p) {
      if (p == 0) return;  // nothing asks what lies behind the start
      const int64_t begin = p * kScanPart, length = std::min(n_, begin + kScanPart) - begin;
      const float maximum = *std::max_element(s_ + begin, s_ + begin + length);
      carries[p] = {maximum, c_.kernels.exponentials(s_ + begin, length, maximum, 1.0f, e_ + begin)};
    });
    carries[parts] = {-std::numeric_limits<float>::infinity(), 0.0};
    for (int64_t p = parts - 1; p > 0; --p) carries[p] = join(carries[p], carries[p + 1]);
    parallel_for(threads, parts, [&](int64_t p) {
      losses[p] = remaining(p * kScanPart, std::min(n_, (p + 1) * kScanPart), carries[p + 1], weight);
    });
    // sum_{k <= m} w_k / S_k, part by part from the front, relative to the shift of the part's first item.
    Scaled* const before = arena.take<Scaled>(parts);
    parallel_for(threads, parts - 1, [&](int64_t p) {
      before[p] = inverse_sums(p * kScanPart, (p + 1) * kScanPart, {0.0f, 0.0}, weight, 0.0, nullptr, nullptr);
    });
    before[parts - 1] = {0.0f, 0.0};
    Scaled total{0.0f, 0.0};
    for (int64_t p = 0; p < parts; ++p) {
      const Scaled own = before[p];
      before[p] = total;
      if (p + 1 < parts) total = {own.shift, own.sum + rescaled(total, own.shift)};
    }
    parallel_for(threads, parts, [&](int64_t p) {
      inverse_sums(p * kScanPart, std::min(n_, (p + 1) * kScanPart), before[p], weight, factor, order, grad);
    });
    double loss = 0.0;
    for (int64_t p = 0; p < parts; ++p) loss += losses[p];
    return loss;
  }

 private:
  // sum * exp(shift) going backward, sum * exp(-shift) going forward
  struct Scaled {
    float shift;
    double sum;
  };

  static Scaled join(const Scaled& a, const Scaled& b) {
    if (b.sum == 0.0) return a;
    const float shift = std::max(a.shift, b.shift);
    return {shift, a.sum * std::exp(static_cast<double>(a.shift) - static_cast<double>(shift)) +
                       b.sum * std::exp(static_cast<double>(b.shift) - static_cast<double>(shift))};
  }
  // sum exp(-shift) as a multiple of exp(-to); to <= shift
  static double rescaled(const Scaled& a, float to) {
    return a.sum == 0.0 ? 0.0 : a.sum * std::exp(static_cast<double>(to) - static_cast<double>(a.shift));
  }

  // First item of the block that ends at `end`, and the shift it uses.
  int64_t block_begin(int64_t begin, int64_t end, float behind, float* shift) const {
    int64_t at = end - 1;
    float highest = std::max(s_[at], behind), lowest = highest;
    while (at > begin && end - at < kScanBlock) {
      const float next = s_[at - 1], up = std::max(highest, next);
      if (static_cast<double>(up) - static_cast<double>(lowest) > kScanRange) break;
      highest = up;
      --at;
    }
    *shift = highest;
    return at;
  }

  template <class Weight>
  double remaining(int64_t begin, int64_t end, Scaled carry, Weight weight) {
    double loss = 0.0, product = 1.0;
    for (int64_t block_end = end; block_end > begin;) {
      float shift;
      const int64_t at = block_begin(begin, block_end, carry.shift, &shift);
      c_.kernels.exponentials(s_ + at, block_end - at, shift, 1.0f, e_ + at);
      double sum =
          carry.sum == 0.0 ? 0.0 : carry.sum * std::exp(static_cast<double>(carry.shift) - static_cast<double>(shift));
      for (int64_t k = block_end - 1; k >= at; --k) {
        sum += static_cast<double>(e_[k]);
        sums_[k] = sum;
        shift_[k] = shift;
      }
      for (int64_t k = at; k < block_end; ++k) {
        const double w = weight(k);
        if (w == 0.0) continue;
        loss += w * (static_cast<double>(shift) - static_cast<double>(s_[k]));
        if (w != 1.0) {
          loss += w * std::log(sums_[k]);
        } else {  // one logarithm for the product of several; a sum lies between e^-60 and the number of items
          product *= sums_[k];
          if (product < 1e-200 || product > 1e200) loss += std::log(product), product = 1.0;
        }
      }
      carry = {shift, sum};
      block_end = at;
    }
    return loss + std::log(product);
  }

  // Continues sum_k w_k exp(-L_k) over [begin, end); with `order`, also adds the gradient.
  template <class Weight>
  Scaled inverse_sums(int64_t begin, int64_t end, Scaled total, Weight weight, double factor, const int32_t* order,
                      double* grad) {
    for (int64_t k = begin; k < end; ++k) {
      if (total.sum != 0.0 && shift_[k] != total.shift) total.sum = rescaled(total, shift_[k]);
      total.shift = shift_[k];
      const double w = weight(k);
      if (w != 0.0) total.sum += w / sums_[k];
      if (order) grad[order[k]] += factor * (static_cast<double>(e_[k]) * total.sum - w);
    }
    return total;
  }

  const Context& c_;
  const float* s_;
  int64_t n_;
  int num_threads_;
  float* e_;
  double* sums_;
  float* shift_;
};

// First word of Philox4x32-10 (Salmon et al. 2011) for the counter (i, sample, 0, 0).
uint32_t philox(uint64_t seed, uint32_t sample, uint32_t i) {
  uint32_t c[4] = {i, sample, 0, 0}, key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(a)};
    std::copy_n(next, 4, c);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return c[0];
}

// Indices by falling key; keys are whole numbers, so that no NaN can break the comparison.
void order_keys(const uint64_t* keys, int64_t n, int32_t* order) {
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
  std::sort(order, order + n, [keys](int32_t a, int32_t b) { return keys[a] != keys[b] ? keys[a] > keys[b] : a < b; });
}

Result listmle(const Context& c, const List& list, Arena& arena, double* grad) {
  const int64_t n = list.n, k = cutoff(c, n);
  const int32_t* order = order_of(c, list.labels, list, arena);
  if (c.settings.option != 0.0) {  // shuffle first: equal labels then stand in random order
    uint64_t* const keys = arena.take<uint64_t>(n);
    int32_t *const shuffled = arena.take<int32_t>(n), *const composed = arena.take<int32_t>(n);
    for (int64_t i = 0; i < n; ++i) keys[i] = ~uint64_t{philox(list.seed, 0, static_cast<uint32_t>(i))};
    order_keys(keys, n, shuffled);
    order = order_of(c, gather(list.labels, shuffled, n, arena), list, arena);
    for (int64_t r = 0; r < n; ++r) composed[r] = shuffled[order[r]];
    order = composed;
  }
  PlackettLuce model(c, gather(list.scores, order, n, arena), n, list.num_threads, arena);
  return {model.run([k](int64_t rank) { return rank < k ? 1.0 : 0.0; }, 1.0, order, arena, grad), 1};
}

Result p_listmle(const Context& c, const List& list, Arena& arena, double* grad) {
  const int64_t n = list.n;
  const int32_t* const order = order_of(c, list.labels, list, arena);
  PlackettLuce model(c, gather(list.scores, order, n, arena), n, list.num_threads, arena);
  // 2^(n - rank) - 1, or that over its sum 2^n - 1 - n, counted in units of 2^n, where nothing overflows.
  const double unit = std::exp2(-static_cast<double>(n)), sum = 1.0 - static_cast<double>(n + 1) * unit;
  const bool normalized = c.settings.option != 0.0;
  const auto weight = [=](int64_t place) {
    const int rank = static_cast<int>(std::min<int64_t>(place + 1, 2000));  // 2^-2000 is 0
    return normalized ? (std::ldexp(1.0, -rank) - unit) / sum : std::exp2(static_cast<double>(n - 1 - place)) - 1.0;
  };
  return {model.run(weight, 1.0, order, arena, grad), 1};
}

Result pg_rank(const Context& c, const List& list, Arena& arena, double* grad) {
  const int64_t n = list.n, k = cutoff(c, n), samples = static_cast<int64_t>(c.settings.count);
  const auto [by_labels, falling, ideal] = ideal_order(c, list, k, arena);
  if (!(ideal > 0.0)) return {};
  double* const gains = arena.take<double>(n);
  for (int64_t r = 0; r < n; ++r) gains[by_labels[r]] = falling[r];
  int32_t* const orders = arena.take<int32_t>(samples * n);
  double *const rewards = arena.take<double>(samples), mean = 0.0;
  uint64_t* const keys = arena.take<uint64_t>(n);
  for (int64_t sample = 0; sample < samples; ++sample) {
    int32_t* const order = orders + sample * n;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t word = philox(list.seed, static_cast<uint32_t>(sample), static_cast<uint32_t>(i));
      const double gumbel = -std::log(-std::log((static_cast<double>(word) + 0.5) * 0x1p-32));
      const double value = static_cast<double>(list.scores[i]) + gumbel + 0.0;
      uint64_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      keys[i] = bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
    }
    order_keys(keys, n, order);
    rewards[sample] = 0.0;
    for (int64_t r = 0; r < k; ++r) rewards[sample] += gains[order[r]] * discount(r + 1) / ideal;
    mean += rewards[sample] / static_cast<double>(samples);
  }
  double loss = 0.0;
  for (int64_t sample = 0; sample < samples; ++sample) {
    const int32_t* const order = orders + sample * n;
    // R - mean of the others = (R - mean of all) N / (N - 1), then the mean over the samples
    const double factor = (rewards[sample] - mean) / static_cast<double>(samples - 1);
    PlackettLuce model(c, gather(list.scores, order, n, arena), n, list.num_threads, arena);
    loss += factor * model.run([](int64_t) { return 1.0; }, factor, order, arena, grad);
  }
  return {loss, 1};
}

// dL/dR of the smooth ranks R_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / T), turned into the gradient.
PairTask smooth_task(const Context& c, const List& list, Arena& arena) {
  PairTask task{};
  task.term = PairTerm::kSmoothRank;
  task.num_items = list.n;
  task.sigma = static_cast<float>(1.0 / c.settings.temperature);
  task.scores = list.scores;
  task.first = all_pairs(list.n, arena);
  constexpr double kLimit = 80.0;  // e^-80 to e^80 fit a float
  const Exponentials e = exponentials_of(c, list.scores, list.n, 1.0 / c.settings.temperature, kLimit, arena);
  if (e.up) {
    task.term = PairTerm::kSmoothRankByProduct;
    task.a = e.up;
    task.b = e.down;
  }
  return task;
}

void smooth_gradient(const Context& c, PairTask task, const double* slopes, const List& list, Arena& arena,
                     double* grad) {
  float* const values = take_floats(arena, list.n);
  for (int64_t i = 0; i < list.n; ++i) values[i] = static_cast<float>(slopes[i]);
  if (task.term == PairTerm::kSmoothRank) {
    task.term = PairTerm::kSmoothGradient;
    task.a = values;
  } else {
    task.term = PairTerm::kSmoothGradientByProduct;
    task.c = values;
  }
  run_pairs(c, task, list.num_threads, arena, grad);
  for (int64_t i = 0; i < list.n; ++i) grad[i] /= c.settings.temperature;
}

Result approx_ndcg(const Context& c, const List& list, Arena& arena, double* grad) {
  const int64_t n = list.n;
  const auto [order, gains, ideal] = ideal_order(c, list, n, arena);
  if (!(ideal > 0.0)) return {};
  const PairTask task = smooth_task(c, list, arena);
  double *const ranks = arena.take<double>(n), *const slopes = arena.take<double>(n);
  run_pairs(c, task, list.num_threads, arena, ranks);
  double loss = 0.0;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t i = order[r];
    const double gain = gains[r] / ideal, beyond = 2.0 + ranks[i], bits = std::log2(beyond);
    loss -= gain / bits;
    slopes[i] = gain / (beyond * std::log(2.0) * bits * bits);
  }
  smooth_gradient(c, task, slopes, list, arena, grad);
  return {loss, 1};
}

Result approx_mrr(const Context& c, const List& list, Arena& arena, double* grad) {
  const int64_t n = list.n;
  const bool average = c.settings.option != 0.0;
  double *const weights = arena.take<double>(n), total = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    weights[i] = average ? static_cast<double>(std::max(list.labels[i], 0.0f)) : list.labels[i] >= 1.0f ? 1.0 : 0.0;
    total += weights[i];
  }
  if (!(total > 0.0)) return {};
  const PairTask task = smooth_task(c, list, arena);
  double *const ranks = arena.take<double>(n), *const slopes = arena.take<double>(n);
  run_pairs(c, task, list.num_threads, arena, ranks);
  if (!average) {  // only the best positive counts, the one with the highest score: smooth ranks fall as scores rise
    int64_t best = -1;
    for (int64_t i = 0; i < n; ++i)
      if (weights[i] != 0.0 && (best < 0 || list.scores[i] > list.scores[best])) best = i;
    std::fill_n(weights, n, 0.0);
    weights[best] = total = 1.0;
  }
  double loss = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double rank = 1.0 + ranks[i];
    loss -= weights[i] / (rank * total);
    slopes[i] = weights[i] / (rank * rank * total);
  }
  smooth_gradient(c, task, slopes, list, arena, grad);
  return {loss, 1};
}

// NeuralSort's matrix, Sinkhorn-scaled: P_t = diag(u_t) K diag(v_t). Columns, then rows, are divided by their sums
// until both are 1 within the tolerance. The published clamp of these sums at 1e-10 never acts: every item is the
// largest of some row, so that no sum falls below 1 / n^2. The gradient goes back through the scalings kept: O(n)
// floats an iteration.
Result neural_ndcg(const Context& c, const List& list, Arena& arena, double* grad) {
  const int64_t n = list.n, k = cutoff(c, n), limit = static_cast<int64_t>(c.settings.count);
  const auto [order, falling, ideal] = ideal_order(c, list, k, arena);
  if (!(ideal > 0.0)) return {};

  // A shift of all scores changes no row of K; centred, the products (n + 1 - 2 i) s_j round least.
  const auto [low, high] = std::minmax_element(list.scores, list.scores + n);
  const float middle = *low + (*high - *low) / 2;
  float* const scores = take_floats(arena, n);
  for (int64_t i = 0; i < n; ++i) scores[i] = list.scores[i] - middle;
  PairTask task{};
  task.term = PairTerm::kSpread;
  task.num_items = n;
  task.scores = scores;
  task.first = all_pairs(n, arena);
  double* const sums = arena.take<double>(n);
  run_pairs(c, task, list.num_threads, arena, sums);
  float* const spread = take_floats(arena, n);
  for (int64_t i = 0; i < n; ++i) spread[i] = static_cast<float>(sums[i]);
  const bool stored = n <= kStoredMatrix;
  SinkhornMatrix matrix{
      n,      scores, spread, static_cast<float>(1.0 / c.settings.temperature), take_floats(arena, stored ? n * n : n),
      stored, false};

  std::vector<float*> u, v;
  double* const columns = arena.take<double>(n);
  const auto next_scaling = [&](std::vector<float*>& all) {
    all.push_back(take_floats(arena, n));
    return all.back();
  };
  std::fill_n(next_scaling(v), n, 1.0f);
  c.kernels.sinkhorn(matrix, v[0], next_scaling(u), columns);
  matrix.filled = stored;
  for (int64_t t = 1; t <= limit; ++t) {
    float* const v_now = next_scaling(v);
    for (int64_t j = 0; j < n; ++j) v_now[j] = static_cast<float>(1.0 / std::max(columns[j], kLeastColumn));
    c.kernels.sinkhorn(matrix, v_now, next_scaling(u), columns);
    double deviation = 0.0;  // of the columns; the rows have just been divided by their sums
    for (int64_t j = 0; j < n; ++j)
      deviation = std::max(deviation, std::fabs(static_cast<double>(v_now[j]) * columns[j] - 1.0));
    if (deviation < c.settings.tolerance) break;
  }

  // dL/dP_ij = -discount_i gain_j / ideal, then back: a scaling 1 / sum passes -(its gradient) times the entries it
  // scales.
  float *const factor = take_floats(arena, n), *const h = take_floats(arena, n);
  double *const gradient = arena.take<double>(n), *const plain = arena.take<double>(n);
  double *const weighted = arena.take<double>(n), *const mass = arena.take<double>(n), loss = 0.0;
  for (double* const sums : {gradient, plain, weighted}) std::fill_n(sums, n, 0.0);
  for (int64_t r = 0; r < n; ++r) h[order[r]] = static_cast<float>(-falling[r] / ideal);
  for (int64_t i = 0; i < n; ++i) factor[i] = i < k ? static_cast<float>(discount(i + 1)) : 0.0f;
  const size_t last = u.size() - 1;
  {
    // The loss: columns of diag(discount u) K against the gains.
    float* const discounted = take_floats(arena, n);
    for (int64_t i = 0; i < n; ++i) discounted[i] = factor[i] * u[last][i];
    c.kernels.sinkhorn_columns(matrix, discounted, mass);
    for (int64_t j = 0; j < n; ++j) loss += static_cast<double>(h[j]) * mass[j] * static_cast<double>(v[last][j]);
  }
  for (size_t level = last + 1; level-- > 0;) {
    const bool direct = level == last;
    if (!direct) {
      for (int64_t j = 0; j < n; ++j) h[j] = static_cast<float>(-gradient[j]);
      std::fill_n(gradient, n, 0.0);
      std::fill_n(factor, n, 1.0f);
    }
    const float* const v_above = v[direct ? last : level + 1];
    c.kernels.sinkhorn_back(matrix, {factor, h, v_above, u[level], v[level], direct, gradient, plain, weighted});
  }
  // z_ij = ((n + 1 - 2 i) s_j - A_j) / T, A_j = sum_k |s_j - s_k|
  float* const spread_slope = take_floats(arena, n);
  for (int64_t j = 0; j < n; ++j) spread_slope[j] = static_cast<float>(-plain[j]);
  task.term = PairTerm::kSpreadGradient;
  task.a = spread_slope;
  run_pairs(c, task, list.num_threads, arena, grad);
  for (int64_t j = 0; j < n; ++j) grad[j] = (grad[j] + weighted[j]) / c.settings.temperature;
  return {loss, 1};
}

// z = sigmoid(sigma (s + t)) with t such that sum z = k; loss = -mean of log z over the positives.
Result soft_topk(const Context& c, const List& list, Arena& arena, double* grad) {
  const int64_t n = list.n;
  const double k = c.settings.k, sigma = c.settings.sigma;
  const auto is_positive = [&](int64_t i) { return list.labels[i] > 0.0f; };
  int64_t positives = 0;
  for (int64_t i = 0; i < n; ++i) positives += is_positive(i);
  if (static_cast<double>(n) <= k || positives == 0) return {};
  // sum z - k, as the z of the items below the best k minus the 1 - z of those: the ones of the sum cancel beforehand,
  // so that a wide gap between the two groups, where z is all but 0 or 1, still has its middle found.
  const int32_t* const order = order_of(c, list.scores, list, arena);
  float* const falling = gather(list.scores, order, n, arena);
  const int64_t best = static_cast<int64_t>(k);
  // Measured from the middle between the best k and the rest, where t and the scores that matter are small and exact.
  const double origin = (static_cast<double>(falling[best - 1]) + static_cast<double>(falling[best])) / 2;
  const double gap = static_cast<double>(falling[best - 1]) - static_cast<double>(falling[best]);
  for (int64_t i = 0; i < n; ++i) falling[i] = static_cast<float>(static_cast<double>(falling[i]) - origin);
  const float slope = static_cast<float>(sigma);
  double t;
  if (constexpr double kWideGap = 60.0; sigma * gap > kWideGap) {
    // z and 1 - z are exponentials to within e^-30 here: sum exp(sigma (s + t)) of the rest = sum exp(-sigma (s + t)).
    float* const parts = take_floats(arena, n);
    const double above = c.kernels.exponentials(falling, best, falling[best - 1], -slope, parts);
    const double below = c.kernels.exponentials(falling + best, n - best, falling[best], slope, parts);
    t = std::log(above / below) / (2.0 * sigma);
  } else {
    // sum z - k, as the z of the rest minus the 1 - z of the best: what would cancel is not added in the first place.
    const auto excess = [&](double shift) {
      const float f = static_cast<float>(shift);
      return c.kernels.sigmoid_sum(falling + best, n - best, slope, f) -
             c.kernels.sigmoid_sum(falling, best, -slope, f);
    };
    const double margin = (10.0 + std::log(static_cast<double>(n))) / sigma;
    double low = -static_cast<double>(falling[0]) - margin, high = -static_cast<double>(falling[n - 1]) + margin;
    for (int step = 0; step < 64; ++step) {
      const double middle = (low + high) / 2;
      (excess(middle) >= 0.0 ? high : low) = middle;
    }
    t = (low + high) / 2;
  }
  // d loss / d s = g - v sum(g) / sum(v), g of the positives alone and v = z (1 - z), in units of its largest.
  double* const u = arena.take<double>(n);
  double nearest = std::numeric_limits<double>::infinity(), slopes = 0.0, mass = 0.0, loss = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    u[i] = sigma * ((static_cast<double>(list.scores[i]) - origin) + t);
    nearest = std::min(nearest, std::fabs(u[i]));
  }
  double* const v = arena.take<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    const double size = std::fabs(u[i]), e = std::exp(-size);
    v[i] = std::exp(nearest - size) / ((1.0 + e) * (1.0 + e));
    mass += v[i];
    if (!is_positive(i)) continue;
    loss += softplus(-u[i]) / static_cast<double>(positives);
    grad[i] = -sigma * sigmoid(-u[i]) / static_cast<double>(positives);
    slopes += grad[i];
  }
  for (int64_t i = 0; i < n; ++i) grad[i] -= v[i] * slopes / mass;
  return {loss, 1};
}

// A relaxed odd-even sorting network of n layers over the hardest negatives and the positives, both rising; loss =
// -mean over the wires of the log of the mass that arrives among its own kind. Mass is followed backward, so one vector
// replaces the permutation matrix: `among[r]` starts as 1 on the ranks of the positives.
Result groco(const Context& c, const List& list, Arena& arena, double* grad) {
  const Split s = split(list, arena);
  if (s.num_positives == 0 || s.num_others == 0) return {};
  const auto rising = [&](const float* scores, int64_t n, int64_t keep, const int32_t* index, double* x, int32_t* at) {
    const List items{n, scores, nullptr, 0, 1};
    const int32_t* const order = order_of(c, scores, items, arena);
    for (int64_t r = 0; r < keep; ++r) {
      x[keep - 1 - r] = static_cast<double>(scores[order[r]]);
      at[keep - 1 - r] = index[order[r]];
    }
  };
  const int64_t negatives = std::min(s.num_others, static_cast<int64_t>(c.settings.count));
  const int64_t n = negatives + s.num_positives;
  double *const x = arena.take<double>(n * (n + 1)), *const alpha = arena.take<double>(n * n);
  int32_t* const wires = arena.take<int32_t>(n);
  rising(s.others, s.num_others, negatives, s.other_index, x, wires);
  rising(s.positives, s.num_positives, s.num_positives, s.positive_index, x + negatives, wires + negatives);

  // Forward: the values of every layer.
  constexpr double kPi = 3.14159265358979323846;
  const double steepness = c.settings.sigma;
  for (int64_t layer = 0; layer < n; ++layer) {
    const double* const now = x + layer * n;
    double* const next = x + (layer + 1) * n;
    std::copy_n(now, n, next);
    for (int64_t a = layer % 2; a + 1 < n; a += 2) {
      const double keep = std::atan(steepness * (now[a + 1] - now[a])) / kPi + 0.5;
      alpha[layer * n + a] = keep;
      next[a] = keep * now[a] + (1.0 - keep) * now[a + 1];
      next[a + 1] = (1.0 - keep) * now[a] + keep * now[a + 1];
    }
  }
  // mass[layer][w]: how much of what enters the layer on wire w ends among the positive ranks, and likewise `other` for
  // the negative ones. Each is a sum of positive terms, so neither is 1 minus the other.
  double *const mass = arena.take<double>(n * (n + 1)), *const other = arena.take<double>(n * (n + 1));
  for (int64_t w = 0; w < n; ++w) {
    mass[n * n + w] = w >= negatives ? 1.0 : 0.0;
    other[n * n + w] = w < negatives ? 1.0 : 0.0;
  }
  const auto swap_back = [&](double* p, int64_t layer) {
    const double* const next = p + (layer + 1) * n;
    double* const now = p + layer * n;
    std::copy_n(next, n, now);
    for (int64_t a = layer % 2; a + 1 < n; a += 2) {
      const double keep = alpha[layer * n + a];
      now[a] = keep * next[a] + (1.0 - keep) * next[a + 1];
      now[a + 1] = (1.0 - keep) * next[a] + keep * next[a + 1];
    }
  };
  for (int64_t layer = n - 1; layer >= 0; --layer) swap_back(mass, layer), swap_back(other, layer);
  double loss = 0.0;
  // d loss / d mass[0], pushed forward through the layers, gives d loss / d alpha of each.
  double *const slope = arena.take<double>(n), *const alpha_slope = arena.take<double>(n * n);
  for (int64_t w = 0; w < n; ++w) {
    const double hit = std::min(std::max(w < negatives ? other[w] : mass[w], 1e-30), 1.0);
    loss -= std::log(hit) / static_cast<double>(n);
    // The slope of mass; other = 1 - mass has the opposite one.
    slope[w] = (w < negatives ? 1.0 : -1.0) / (hit * static_cast<double>(n));
  }
  for (int64_t layer = 0; layer < n; ++layer) {
    const double* const next = mass + (layer + 1) * n;
    for (int64_t a = layer % 2; a + 1 < n; a += 2) {
      const double keep = alpha[layer * n + a], left = slope[a], right = slope[a + 1];
      alpha_slope[layer * n + a] = (left - right) * (next[a] - next[a + 1]);
      slope[a] = keep * left + (1.0 - keep) * right;
      slope[a + 1] = (1.0 - keep) * left + keep * right;
    }
  }
  // Back through the values that the alphas come from.
  double* const value_slope = slope;
  std::fill_n(value_slope, n, 0.0);
  for (int64_t layer = n - 1; layer >= 0; --layer) {
    const double* const now = x + layer * n;
    for (int64_t a = layer % 2; a + 1 < n; a += 2) {
      const double keep = alpha[layer * n + a], low = value_slope[a], high = value_slope[a + 1];
      const double difference = now[a + 1] - now[a], turn = steepness * difference;
      const double by_alpha = alpha_slope[layer * n + a] + (high - low) * difference;
      const double by_difference = by_alpha * steepness / (kPi * (1.0 + turn * turn));
      value_slope[a] = keep * low + (1.0 - keep) * high - by_difference;
      value_slope[a + 1] = (1.0 - keep) * low + keep * high + by_difference;
    }
  }
  for (int64_t w = 0; w < n; ++w) grad[wires[w]] = value_slope[w];
  return {loss, 1};
}

ListFunction function_of(ListwiseKind kind) {
  switch (kind) {
    case ListwiseKind::kRankNet:
      return ranknet;
    case ListwiseKind::kWeightedRankNet:
      return weighted_ranknet;
    case ListwiseKind::kSoftRankNet:
      return soft_ranknet;
    case ListwiseKind::kLambdaRank:
    case ListwiseKind::kNdcgLoss1:
    case ListwiseKind::kNdcgLoss2:
    case ListwiseKind::kNdcgLoss2pp:
      return ndcg_weighted;
    case ListwiseKind::kLipo:
      return lipo;
    case ListwiseKind::kDcgLambda:
    case ListwiseKind::kDcg2Lambda:
      return dcg_lambda;
    case ListwiseKind::kSkipRankNet:
      return skip_ranknet;
    case ListwiseKind::kListNet:
      return listnet;
    case ListwiseKind::kSoftmax:
      return softmax;
    case ListwiseKind::kInfoNce:
      return infonce;
    case ListwiseKind::kDecoupledSoftmax:
      return decoupled_softmax;
    case ListwiseKind::kKlDistillation:
      return kl_distillation;
    case ListwiseKind::kMarginMse:
      return margin_mse;
    case ListwiseKind::kListMle:
      return listmle;
    case ListwiseKind::kPListMle:
      return p_listmle;
    case ListwiseKind::kPgRank:
      return pg_rank;
    case ListwiseKind::kApproxNdcg:
      return approx_ndcg;
    case ListwiseKind::kApproxMrr:
      return approx_mrr;
    case ListwiseKind::kNeuralNdcg:
      return neural_ndcg;
    case ListwiseKind::kSoftTopK:
      return soft_topk;
    case ListwiseKind::kGroCo:
      return groco;
  }
  return nullptr;
}

// Labels are a teacher's scores, and equal ones a target like any other.
bool is_distillation(ListwiseKind kind) {
  return kind == ListwiseKind::kSoftRankNet || kind == ListwiseKind::kKlDistillation ||
         kind == ListwiseKind::kMarginMse;
}

// About how many pairs a list costs.
double work_of(ListwiseKind kind, int64_t items) {
  const double n = static_cast<double>(items);
  if (kind <= ListwiseKind::kDcg2Lambda || kind == ListwiseKind::kApproxNdcg || kind == ListwiseKind::kApproxMrr)
    return n * n;
  return kind == ListwiseKind::kNeuralNdcg ? 100.0 * n * n : 32.0 * n;
}

template <class T>
void widen(const ListwiseArgs& args, int64_t begin, int64_t count, const int64_t* items, float* out) {
  const T* const scores = static_cast<const T*>(args.scores);
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(scores[items ? items[i] : begin + i]);
}

// Packs the valid items of list `l`, runs its kind, and writes its gradient, not yet divided by what the batch counts.
Result run_list(const Context& c, ListFunction function, int64_t l, int num_threads, Arena& arena) {
  const ListwiseArgs& args = c.args;
  const int64_t begin = args.offsets[l], end = args.offsets[l + 1];
  std::fill(args.grad + begin, args.grad + end, 0.0f);
  arena.reset();
  int64_t n = end - begin;
  const int64_t* items = nullptr;
  if (args.where) {
    int64_t* const valid = arena.take<int64_t>(n);
    n = 0;
    for (int64_t i = begin; i < end; ++i)
      if (args.where[i]) valid[n++] = i;
    items = valid;
  }
  if (n < 2) return {};
  float *const scores = take_floats(arena, n, kInertScore), *const labels = take_floats(arena, n);
  if (args.dtype == DType::kFloat32)
    widen<float>(args, begin, n, items, scores);
  else if (args.dtype == DType::kBFloat16)
    widen<BFloat16>(args, begin, n, items, scores);
  else
    widen<Float16>(args, begin, n, items, scores);
  bool differ = false;
  for (int64_t i = 0; i < n; ++i) {
    labels[i] = args.labels[items ? items[i] : begin + i];
    differ |= labels[i] != labels[0];
  }
  if (!differ && !is_distillation(args.kind)) return {};
  double* const grad = arena.take<double>(n);
  std::fill_n(grad, n, 0.0);
  const List list{n, scores, labels, args.seed + static_cast<uint64_t>(l), num_threads};
  Result result = function(c, list, arena, grad);
  if (result.pairs == 0) return {};
  double scale = c.settings.unit;
  if (c.settings.divisor == 1.0) scale /= static_cast<double>(result.pairs);
  if (c.settings.divisor == 2.0) scale /= static_cast<double>(n);
  result.loss *= scale;
  for (int64_t i = 0; i < n; ++i) args.grad[items ? items[i] : begin + i] = static_cast<float>(scale * grad[i]);
  return result;
}

}  // namespace

Status listwise_loss(const ListwiseArgs& args, int isa) {
  for (int64_t l = 0; l <= args.num_lists; ++l) {
    const int64_t before = l > 0 ? args.offsets[l - 1] : 0;
    if (args.offsets[l] < before || args.offsets[l] > args.num_items) return Status::kBadOffsets;
  }
  const Context context{args, args.settings, select_listwise_kernels(args.dtype, isa)};
  const ListFunction function = function_of(args.kind);
  const int threads = std::max(args.num_threads, 1);
  const auto length = [&](int64_t l) { return args.offsets[l + 1] - args.offsets[l]; };
  std::fill(args.grad, args.grad + args.offsets[0], 0.0f);
  std::fill(args.grad + args.offsets[args.num_lists], args.grad + args.num_items, 0.0f);

  // Lists that would keep one thread busy for longer than its share get all threads, one after the other.
  double work = 0.0;
  for (int64_t l = 0; l < args.num_lists; ++l) work += work_of(args.kind, length(l));
  const auto alone = [&](int64_t l) {
    return threads > 1 && length(l) > kLongList && work_of(args.kind, length(l)) * threads > work;
  };
  std::vector<Result> results(static_cast<size_t>(args.num_lists));
  const int shared = work < kSerialWork ? 1 : threads;
  std::vector<Arena> arenas(static_cast<size_t>(shared));
  // A few lists at a time, so that threads do not meet on every short one.
  constexpr int64_t kTogether = 4;
  parallel_for(shared, (args.num_lists + kTogether - 1) / kTogether, [&](int64_t group) {
    for (int64_t l = group * kTogether; l < std::min(args.num_lists, (group + 1) * kTogether); ++l)
      if (!alone(l))
        results[static_cast<size_t>(l)] =
            run_list(context, function, l, 1, arenas[static_cast<size_t>(omp_get_thread_num())]);
  });
  for (int64_t l = 0; l < args.num_lists; ++l)
    if (alone(l)) results[static_cast<size_t>(l)] = run_list(context, function, l, threads, arenas[0]);

  if (args.reduction == ListwiseReduction::kNone) {
    for (int64_t l = 0; l < args.num_lists; ++l)
      args.loss[l] = static_cast<float>(results[static_cast<size_t>(l)].loss);
    return Status::kOk;
  }
  double loss = 0.0;
  int64_t lists = 0, pairs = 0;
  for (const Result& result : results) {
    loss += result.loss;
    lists += result.pairs > 0;
    pairs += result.pairs;
  }
  int64_t count = 1;
  if (args.reduction == ListwiseReduction::kMean) count = std::max<int64_t>(lists, 1);
  if (args.reduction == ListwiseReduction::kPairMean) count = std::max<int64_t>(pairs, 1);
  *args.loss = static_cast<float>(loss / static_cast<double>(count));
  const float inverse = static_cast<float>(1.0 / static_cast<double>(count));
  if (count > 1)
    for (int64_t i = 0; i < args.num_items; ++i) args.grad[i] *= inverse;
  return Status::kOk;
}

}  // namespace rankernel
