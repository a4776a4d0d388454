// The inner loops of listwise_loss for one instruction set, on the vectors of simd/.

struct Yes {
  constexpr operator bool() const { return true; }
};
struct No {
  constexpr operator bool() const { return false; }
};

constexpr int64_t kRowBlock = 64, kColumnTile = 64 * kWidth;

// What one item brings to a pair.
struct PairItem {
  Vec score, a, b, c, inside;
};

struct PairValues {
  Vec loss, row, column;
};

template <PairTerm kTerm>
constexpr bool uses_a() {
  return kTerm != PairTerm::kOne && kTerm != PairTerm::kSmoothRank && kTerm != PairTerm::kSpread;
}
template <PairTerm kTerm>
constexpr bool uses_b() {
  return kTerm == PairTerm::kAbsolute || kTerm == PairTerm::kCombined || kTerm == PairTerm::kReweighted ||
         kTerm == PairTerm::kSmoothRankByProduct || kTerm == PairTerm::kSmoothGradientByProduct;
}
template <PairTerm kTerm>
constexpr bool uses_c() {
  return kTerm == PairTerm::kSmoothGradientByProduct || kTerm == PairTerm::kRelative || kTerm == PairTerm::kCombined ||
         kTerm == PairTerm::kReweighted;
}
template <PairTerm kTerm>
constexpr bool is_cut() {
  return kTerm == PairTerm::kAbsolute || kTerm == PairTerm::kRelative || kTerm == PairTerm::kCombined ||
         kTerm == PairTerm::kBothWays;
}
template <PairTerm kTerm>
constexpr bool has_loss() {
  return kTerm < PairTerm::kSmoothRank;
}

template <PairTerm kTerm>
inline PairItem row_item(const PairTask& t, int64_t i) {
  PairItem item{set1(t.scores[i]), zero(), zero(), zero(), zero()};
  if constexpr (uses_a<kTerm>()) item.a = set1(t.a[i]);
  if constexpr (uses_b<kTerm>()) item.b = set1(t.b[i]);
  if constexpr (uses_c<kTerm>()) item.c = set1(t.c[i]);
  if constexpr (is_cut<kTerm>()) item.inside = set1(t.inside[i]);
  return item;
}

template <PairTerm kTerm>
inline PairItem column_items(const PairTask& t, int64_t j) {
  PairItem item{load(t.scores + j), zero(), zero(), zero(), zero()};
  if constexpr (uses_a<kTerm>()) item.a = load(t.a + j);
  if constexpr (uses_b<kTerm>()) item.b = load(t.b + j);
  if constexpr (uses_c<kTerm>()) item.c = load(t.c + j);
  if constexpr (is_cut<kTerm>()) item.inside = load(t.inside + j);
  return item;
}

template <PairTerm kTerm>
struct PairFunction {
  Vec sigma, mu;
  const float* table;
  bool either;

  explicit PairFunction(const PairTask& t)
      : sigma(set1(t.sigma)), mu(set1(t.mu)), table(t.table), either(t.cut == PairCut::kEither) {}

  Vec cut(const PairItem& i, const PairItem& j) const {
    return either ? max(i.inside, j.inside) : min(i.inside, j.inside);
  }
  static Vec distance(Vec x, Vec y) { return abs(sub(x, y)); }
  Vec relative(const PairItem& i, const PairItem& j) const { return gather(table, distance(i.c, j.c)); }

  Vec weight(const PairItem& i, const PairItem& j) const {
    if constexpr (kTerm == PairTerm::kInverseRanks) return div(set1(1.0f), add(i.a, j.a));
    const Vec gain = distance(i.a, j.a);
    if constexpr (kTerm == PairTerm::kReweighted)
      return mul(mul(gain, relative(i, j)), select_less(i.c, j.c, j.b, i.b));
    Vec discount = zero();
    if constexpr (kTerm == PairTerm::kAbsolute) discount = distance(i.b, j.b);
    if constexpr (kTerm == PairTerm::kRelative) discount = relative(i, j);
    if constexpr (kTerm == PairTerm::kCombined) discount = fmadd(mu, relative(i, j), distance(i.b, j.b));
    return mul(mul(gain, discount), cut(i, j));
  }

  PairValues operator()(const PairItem& i, const PairItem& j) const {
    const Vec difference = sub(i.score, j.score);
    if constexpr (kTerm == PairTerm::kSpread) return {zero(), abs(difference), abs(difference)};
    if constexpr (kTerm == PairTerm::kSpreadGradient) {
      const Vec sum = add(i.a, j.a);
      const Vec signed_sum =
          select_less(difference, zero(), sub(zero(), sum), select_less(zero(), difference, sum, zero()));
      return {zero(), signed_sum, sub(zero(), signed_sum)};
    }
    if constexpr (kTerm == PairTerm::kSmoothRankByProduct || kTerm == PairTerm::kSmoothGradientByProduct) {
      const Vec e = mul(i.b, j.a), rest = div(set1(1.0f), add(set1(1.0f), e)), share = mul(e, rest);
      if constexpr (kTerm == PairTerm::kSmoothRankByProduct) return {zero(), share, rest};
      const Vec change = mul(sub(j.c, i.c), mul(share, rest));
      return {zero(), change, sub(zero(), change)};
    }
    const Logistic x = logistic(mul(sigma, difference));
    if constexpr (kTerm == PairTerm::kSmoothRank || kTerm == PairTerm::kSmoothGradient) {
      if constexpr (kTerm == PairTerm::kSmoothRank) return {zero(), x.sigmoid, x.complement};
      const Vec change = mul(sub(j.a, i.a), mul(x.sigmoid, x.complement));
      return {zero(), change, sub(zero(), change)};
    }
    Vec loss = x.softplus, slope = x.sigmoid;
    if constexpr (kTerm == PairTerm::kSoft || kTerm == PairTerm::kBothWays) {
      // softplus(x) = softplus(-x) + x and sigmoid(x) = 1 - sigmoid(-x): w1 softplus(-x) + w2 softplus(x) has the slope
      // -(w1 + w2) sigmoid(-x) + w2.
      Vec forward = i.a, backward = j.a;
      if constexpr (kTerm == PairTerm::kSoft) {
        const Logistic target = logistic(sub(i.a, j.a));
        forward = target.complement;
        backward = target.sigmoid;
      } else {
        forward = mul(forward, cut(i, j));
        backward = mul(backward, cut(i, j));
      }
      const Vec both = add(forward, backward), scaled = mul(sigma, difference);
      loss = fmadd(both, x.softplus, mul(backward, scaled));
      slope = sub(mul(both, x.sigmoid), backward);
    } else if constexpr (kTerm != PairTerm::kOne) {
      const Vec w = weight(i, j);
      loss = mul(w, loss);
      slope = mul(w, slope);
    }
    return {loss, sub(zero(), slope), slope};
  }
};

// Whether a column whose score is -inf adds nothing to a row by itself, so that the padding needs no mask.
template <PairTerm kTerm>
constexpr bool padding_is_inert() {
  return kTerm < PairTerm::kSoft || (kTerm >= PairTerm::kSmoothRank && kTerm < PairTerm::kSpread);
}

// One row and one vector of columns; with kMasked only the lanes [low, high) count.
template <PairTerm kTerm, bool kMasked>
inline void meet(const PairFunction<kTerm>& function, const PairItem& row, const PairItem& columns, int low, int high,
                 Vec& total, Vec& received, Vec& loss) {
  PairValues values = function(row, columns);
  if constexpr (kMasked) {
    values.loss = keep(values.loss, low, high, zero());
    values.row = keep(values.row, low, high, zero());
    values.column = keep(values.column, low, high, zero());
  }
  total = add(total, values.row);
  received = add(received, values.column);
  if constexpr (has_loss<kTerm>()) loss = add(loss, values.loss);
}

// Rows [row, row + kGroup) against the columns of one tile: sums of the rows in registers, those of the columns in
// `partial`.
template <PairTerm kTerm, int kGroup>
inline double pair_group(const PairTask& t, const PairFunction<kTerm>& function, int64_t row, int64_t tile, int64_t end,
                         float* partial, double* sums) {
  PairItem items[kGroup];
  Vec totals[kGroup], loss = zero();
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) {
    items[r] = row_item<kTerm>(t, row + r);
    totals[r] = zero();
  }
  const auto masked = [&](int64_t j) {
    const PairItem columns = column_items<kTerm>(t, j);
    Vec received = load(partial + (j - tile));
    const int high = static_cast<int>(smaller(end - j, int64_t{kWidth}));
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      const int low = static_cast<int>(smaller(larger(t.first[row + r] - j, int64_t{0}), int64_t{kWidth}));
      meet<kTerm, true>(function, items[r], columns, low, high, totals[r], received, loss);
    }
    store(partial + (j - tile), received);
  };
  const int64_t ragged = smaller(static_cast<int64_t>(t.first[row + kGroup - 1]), end);  // every row meets what follows
  const int64_t whole = padding_is_inert<kTerm>() ? end : end - kWidth + 1;
  int64_t j = larger(tile, round_down(t.first[row], kWidth));
  for (; j < ragged; j += kWidth) masked(j);
  for (; j < whole; j += kWidth) {
    const PairItem columns = column_items<kTerm>(t, j);
    Vec received = load(partial + (j - tile));
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r)
      meet<kTerm, false>(function, items[r], columns, 0, kWidth, totals[r], received, loss);
    store(partial + (j - tile), received);
  }
  for (; j < end; j += kWidth) masked(j);
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) sums[row + r] += static_cast<double>(reduce_add(totals[r]));
  return has_loss<kTerm>() ? static_cast<double>(reduce_add(loss)) : 0.0;
}

// The same for kOneByProduct, in a third of the instructions: e^-x is one product of a row's and a column's
// exponential, and log(1 + e) is taken once for many pairs, of their product: with P = prod (1 + e_k) - 1, a further
// pair makes it P (1 + e) + e, a sum of positive terms, so that even tiny losses keep their relative accuracy. Padding
// has a = 0.
template <int kGroup>
inline double product_group(const PairTask& t, int64_t row, int64_t tile, int64_t end, float* partial, double* sums) {
  Vec items[kGroup], totals[kGroup], products[kGroup], loss = zero();
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) {
    items[r] = set1(t.b[row + r]);
    totals[r] = zero();
    products[r] = zero();
  }
  const auto column = [&](auto masked, int64_t j) {
    const Vec a = load(t.a + j);
    Vec received = load(partial + (j - tile));
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      Vec e = mul(items[r], a);
      if constexpr (masked)
        e = keep(e, static_cast<int>(smaller(larger(t.first[row + r] - j, int64_t{0}), int64_t{kWidth})), kWidth,
                 zero());
      const Vec one = add(set1(1.0f), e), slope = div(e, one);
      products[r] = fmadd(products[r], one, e);
      totals[r] = sub(totals[r], slope);
      received = add(received, slope);
    }
    store(partial + (j - tile), received);
  };
  const int64_t ragged = smaller(static_cast<int64_t>(t.first[row + kGroup - 1]), end);
  for (int64_t j = larger(tile, round_down(t.first[row], kWidth)); j < end;) {
    const int64_t stop = smaller(end, j + t.terms_per_log * kWidth);
    for (; j < smaller(ragged, stop); j += kWidth) column(Yes{}, j);
    for (; j < stop; j += kWidth) column(No{}, j);
    Vec all = zero();
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      all = fmadd(all, products[r], add(all, products[r]));
      products[r] = zero();
    }
    loss = add(loss, log1p(all));
  }
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) sums[row + r] += static_cast<double>(reduce_add(totals[r]));
  return static_cast<double>(reduce_add(loss));
}

template <PairTerm kTerm, int kGroup>
inline double any_group(const PairTask& t, const PairFunction<kTerm>& function, int64_t row, int64_t tile, int64_t end,
                        float* partial, double* sums) {
  if constexpr (kTerm == PairTerm::kOneByProduct)
    return product_group<kGroup>(t, row, tile, end, partial, sums);
  else
    return pair_group<kTerm, kGroup>(t, function, row, tile, end, partial, sums);
}

// Blocks of rows against tiles of columns: float sums stay short, longer ones are in double. Vectors start at multiples
// of their width for all rows, so that `partial` is loaded as it was stored.
template <PairTerm kTerm>
double pair_rows(const PairTask& t, int64_t begin, int64_t end, double* sums) {
  const PairFunction<kTerm> function(t);
  constexpr int kGroup = 4;
  double loss = 0.0;
  alignas(64) float partial[kColumnTile + kPadding];
  for (int64_t block = begin; block < end; block += kRowBlock) {
    const int64_t block_end = smaller(block + kRowBlock, end);
    for (int64_t tile = round_down(t.first[block], kWidth); tile < t.num_items; tile += kColumnTile) {
      const int64_t tile_end = smaller(tile + kColumnTile, t.num_items);
      for (int64_t j = 0; j < tile_end - tile; j += kWidth) store(partial + j, zero());
      int64_t row = block;
      for (; row + kGroup <= block_end && t.first[row] < tile_end; row += kGroup)
        loss += any_group<kTerm, kGroup>(t, function, row, tile, tile_end, partial, sums);
      for (; row < block_end && t.first[row] < tile_end; ++row)
        loss += any_group<kTerm, 1>(t, function, row, tile, tile_end, partial, sums);
      for (int64_t j = tile; j < tile_end; ++j) sums[j] += static_cast<double>(partial[j - tile]);
    }
  }
  return loss;
}

double pairs(const PairTask& t, int64_t begin, int64_t end, double* sums) {
  switch (t.term) {
    case PairTerm::kOne:
      return pair_rows<PairTerm::kOne>(t, begin, end, sums);
    case PairTerm::kOneByProduct:
      return pair_rows<PairTerm::kOneByProduct>(t, begin, end, sums);
    case PairTerm::kInverseRanks:
      return pair_rows<PairTerm::kInverseRanks>(t, begin, end, sums);
    case PairTerm::kAbsolute:
      return pair_rows<PairTerm::kAbsolute>(t, begin, end, sums);
    case PairTerm::kRelative:
      return pair_rows<PairTerm::kRelative>(t, begin, end, sums);
    case PairTerm::kCombined:
      return pair_rows<PairTerm::kCombined>(t, begin, end, sums);
    case PairTerm::kReweighted:
      return pair_rows<PairTerm::kReweighted>(t, begin, end, sums);
    case PairTerm::kSoft:
      return pair_rows<PairTerm::kSoft>(t, begin, end, sums);
    case PairTerm::kBothWays:
      return pair_rows<PairTerm::kBothWays>(t, begin, end, sums);
    case PairTerm::kSmoothRank:
      return pair_rows<PairTerm::kSmoothRank>(t, begin, end, sums);
    case PairTerm::kSmoothGradient:
      return pair_rows<PairTerm::kSmoothGradient>(t, begin, end, sums);
    case PairTerm::kSmoothRankByProduct:
      return pair_rows<PairTerm::kSmoothRankByProduct>(t, begin, end, sums);
    case PairTerm::kSmoothGradientByProduct:
      return pair_rows<PairTerm::kSmoothGradientByProduct>(t, begin, end, sums);
    case PairTerm::kSpread:
      return pair_rows<PairTerm::kSpread>(t, begin, end, sums);
    default:
      return pair_rows<PairTerm::kSpreadGradient>(t, begin, end, sums);
  }
}

// Sums f(vector, lanes) over n items: float over 64 vectors, double beyond.
template <class Function>
inline double sum_over(int64_t n, Function f) {
  double sum = 0.0;
  for (int64_t tile = 0; tile < n; tile += kColumnTile) {
    Vec part = zero();
    for (int64_t i = tile; i < smaller(tile + kColumnTile, n); i += kWidth) {
      const int lanes = static_cast<int>(smaller(n - i, int64_t{kWidth}));
      part = add(part, keep(f(i, lanes), 0, lanes, zero()));
    }
    sum += static_cast<double>(reduce_add(part));
  }
  return sum;
}

void extent(const float* x, int64_t n, float* low, float* high) {
  const Vec nothing = set1(kNegativeInfinity);
  Vec lowest = nothing, highest = nothing;  // the lowest with its sign turned
  for (int64_t i = 0; i < n; i += kWidth) {
    const int lanes = static_cast<int>(smaller(n - i, int64_t{kWidth}));
    const Vec part = load_partial(x + i, lanes);
    lowest = max(lowest, keep(sub(zero(), part), 0, lanes, nothing));
    highest = max(highest, keep(part, 0, lanes, nothing));
  }
  *low = -reduce_max(lowest);
  *high = reduce_max(highest);
}

double exponentials(const float* x, int64_t n, float shift, float scale, float* out) {
  return sum_over(n, [=](int64_t i, int lanes) {
    const Vec e = exp(mul(set1(scale), sub(load_partial(x + i, lanes), set1(shift))));
    store_partial(out + i, e, lanes);
    return e;
  });
}

void logistic_of(const float* x, int64_t n, float* softplus, float* sigmoid) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int lanes = static_cast<int>(smaller(n - i, int64_t{kWidth}));
    const Logistic both = logistic(load_partial(x + i, lanes));
    store_partial(softplus + i, both.softplus, lanes);
    store_partial(sigmoid + i, both.sigmoid, lanes);
  }
}

double sigmoid_sum(const float* x, int64_t n, float sigma, float shift) {
  return sum_over(n, [=](int64_t i, int lanes) {
    return logistic(mul(set1(sigma), add(load_partial(x + i, lanes), set1(shift)))).complement;
  });
}

// n + 1 - 2 i of row i, which counts from 1 there and from 0 here
inline float row_weight(const SinkhornMatrix& m, int64_t i) { return static_cast<float>(m.n - 1 - 2 * i); }

// Row i of the matrix: as stored, or computed into m.rows.
inline const float* kernel_row(const SinkhornMatrix& m, int64_t i) {
  float* const row = m.rows + (m.stored ? i * m.n : 0);
  if (m.filled) return row;
  const float weight = row_weight(m, i);
  Vec highest = set1(kNegativeInfinity);
  for (int64_t j = 0; j < m.n; j += kWidth) {
    const int lanes = static_cast<int>(smaller(m.n - j, int64_t{kWidth}));
    Vec z = fmadd(set1(weight), load_partial(m.scores + j, lanes), sub(zero(), load_partial(m.spread + j, lanes)));
    z = mul(z, set1(m.inverse_temperature));
    highest = max(highest, keep(z, 0, lanes, set1(kNegativeInfinity)));
    store_partial(row + j, z, lanes);
  }
  exponentials(row, m.n, reduce_max(highest), 1.0f, row);
  return row;
}

// columns += weight times the row, in double: a float sum over many rows would lose more than the rest of the method.
inline void add_row(const float* row, int64_t n, float weight, double* columns) {
  for (int64_t j = 0; j < n; ++j) columns[j] += static_cast<double>(weight * row[j]);
}

void sinkhorn(const SinkhornMatrix& m, const float* v, float* u, double* columns) {
  for (int64_t j = 0; j < m.n; ++j) columns[j] = 0.0;
  for (int64_t i = 0; i < m.n; ++i) {
    const float* const row = kernel_row(m, i);
    const auto scaled = [&](int64_t j, int lanes) {
      return mul(load_partial(row + j, lanes), load_partial(v + j, lanes));
    };
    u[i] = static_cast<float>(1.0 / sum_over(m.n, scaled));
    add_row(row, m.n, u[i], columns);
  }
}

void sinkhorn_columns(const SinkhornMatrix& m, const float* weights, double* columns) {
  for (int64_t j = 0; j < m.n; ++j) columns[j] = 0.0;
  for (int64_t i = 0; i < m.n; ++i) {
    add_row(kernel_row(m, i), m.n, weights[i], columns);
  }
}

void sinkhorn_back(const SinkhornMatrix& m, const SinkhornStep& s) {
  for (int64_t i = 0; i < m.n; ++i) {
    const float* const row = kernel_row(m, i);
    const float weight = row_weight(m, i);
    const Vec u = set1(s.u[i]), factor = set1(s.factor[i]);
    const auto x_of = [&](int64_t j, int lanes) {
      const Vec mass = mul(mul(u, load_partial(row + j, lanes)), load_partial(s.v + j, lanes));
      return mul(mul(factor, load_partial(s.h + j, lanes)), mass);
    };
    const float back = -static_cast<float>(sum_over(m.n, x_of)) * s.u[i];
    for (int64_t j = 0; j < m.n; ++j) {
      const float x = s.factor[i] * s.h[j] * (s.u[i] * row[j] * s.v[j]), y = back * (row[j] * s.v_before[j]);
      s.gradient[j] += static_cast<double>(s.direct ? x + y : y);
      s.plain[j] += static_cast<double>(x + y);
      s.weighted[j] += static_cast<double>(weight) * static_cast<double>(x + y);
    }
  }
}

// Sixteen keys at a time against every key, in the compiler's own vectors, which fit any instruction set. `keys` has
// sixteen to spare.
void count_ranks(const uint32_t* keys, int64_t n, int32_t* ranks) {
  constexpr int kKeys = 16;
  using Keys = uint32_t __attribute__((vector_size(4 * kKeys)));
  using Counts = int32_t __attribute__((vector_size(4 * kKeys)));
  const Counts lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t block = 0; block < n; block += kKeys) {
    Keys mine;
    __builtin_memcpy(&mine, keys + block, sizeof mine);
    const int64_t end = smaller(block + kKeys, n);
    Counts counts = {0};  // a comparison that holds is -1
    for (int64_t j = 0; j < block; ++j) counts -= keys[j] <= mine;
    for (int64_t j = block; j < end; ++j)
      counts -= (keys[j] < mine) | ((keys[j] == mine) & (static_cast<int32_t>(j - block) < lane));
    for (int64_t j = end; j < n; ++j) counts -= keys[j] < mine;
    int32_t of_block[kKeys];
    __builtin_memcpy(of_block, &counts, sizeof counts);
    for (int64_t i = block; i < end; ++i) ranks[i] = of_block[i - block];
  }
}

inline ListwiseKernels kernels() {
  return {count_ranks, pairs,    extent,           exponentials, logistic_of,
          sigmoid_sum, sinkhorn, sinkhorn_columns, sinkhorn_back};
}
