// document_logsumexp and token_attention_mass for one instruction set, on tiles of simd/tile.h. The few query rows meet
// keys in float32: the work is reading the keys once, and backward writing their gradient once.

// C[R x V vectors] (+)= A^T B for row-major A [depth x R] and B [depth x V vectors], all accumulators in registers:
// multiply_rows() of simd/panels.h with A read across, so that the gradients of scores need not be transposed.
template <int R, int V>
inline void multiply_transposed(const float* a, const float* b, int64_t depth, float* c, int64_t c_stride,
                                bool accumulate) {
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = zero();
  for (int64_t k = 0; k < depth; ++k, a += kScoreStride, b += kQueryStride) {
    Vec columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = load(b + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec row = set1(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = fmadd(row, columns[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* const to = c + r * c_stride + v * kWidth;
      store(to, accumulate ? add(load(to), sum[r][v]) : sum[r][v]);
    }
}

template <class T>
struct DocumentScores {
  using ScoreTile = Tile<FloatPanels>;
  const DocumentScoresArgs& args;
  const ScoreTask& task;
  int64_t group, num_keys;
  ScoreTile tile;
  int64_t* loaded;   // [tile rows], backward only: which row of the task (times heads) each is
  float* grad_keys;  // [num_keys rounded up to kRows, tile.columns], backward only

  DocumentScores(const DocumentScoresArgs& args, const ScoreTask& task, int64_t max_keys, bool backward, Arena& arena)
      : args(args),
        task(task),
        group(args.num_query_heads / args.num_kv_heads),
        num_keys(task.key_end - task.key_begin),
        tile(args.head_size, args.scale, args.softcap, max_keys, backward, arena) {
    loaded = arena.take<int64_t>(backward ? ScoreTile::kTileRows : 0);
    grad_keys = arena.take<float>(backward ? round_up(max_keys, kRows) * tile.columns : 0);
  }

  static size_t scratch_bytes(const DocumentScoresArgs& args, int64_t max_keys, bool backward) {
    Arena arena{nullptr, 0};
    const ScoreTask none{};
    DocumentScores(args, none, max_keys, backward, arena);
    return arena.used;
  }

  int64_t tile_rows() const { return task.num_rows * group; }
  int64_t query_head(int64_t kv_head, int64_t row) const { return kv_head * group + row % group; }
  // Where a [task.num_rows, num_query_heads] array has a row of the task (times heads).
  int64_t index(int64_t kv_head, int64_t row) const {
    return row / group * args.num_query_heads + query_head(kv_head, row);
  }

  void pack(int64_t kv_head) {
    const Columns columns{0, 0, task.key_begin};
    pack_keys<FloatPanels, T>(args.key, kv_head, args.head_size, columns, 0, num_keys, tile.depth, tile.keys);
  }

  // Every row sees the keys up to its own position. Rows of a task are sorted by position, so highs rise as the tile
  // expects.
  void load_row(int64_t kv_head, int64_t row, int64_t r) {
    const int64_t query = task.order[row / group];
    copy_row<FloatPanels>(row_of<T>(args.query, query, query_head(kv_head, row)), args.head_size, tile.columns,
                          tile.queries + r * kQueryStride);
    tile.lows[r] = 0;
    tile.highs[r] = smaller(args.rows[query] + 1, task.key_end) - task.key_begin;
  }

  // Scores of rows [row, row + rows) of the task (times heads) against all its keys.
  void score(int64_t kv_head, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) load_row(kv_head, row + r, r);
    tile.multiply_keys(rows, 0, num_keys);
  }

  static void reduce(const DocumentScoresArgs& args, const ScoreTask& task, int64_t kv_head, SoftmaxState* states,
                     int64_t max_keys, void* scratch) {
    Arena arena{static_cast<char*>(scratch), 0};
    DocumentScores self(args, task, max_keys, false, arena);
    self.pack(kv_head);
    for (int64_t row = 0; row < self.tile_rows(); row += ScoreTile::kTileRows) {
      const int64_t rows = smaller(self.tile_rows() - row, ScoreTile::kTileRows);
      self.score(kv_head, row, rows);
      for (int64_t r = 0; r < rows; ++r) {
        float* const scores = self.tile.scores + r * kScoreStride;
        const float maximum = self.tile.row_maximum(scores, 0, self.tile.highs[r]);
        const float sum = self.tile.row_exponentials(scores, 0, self.tile.highs[r], maximum, scores);
        const float weighted = task.weights ? self.weighted_sum(scores, self.tile.highs[r]) : 0.0f;
        states[self.index(kv_head, row + r)] = {maximum, sum, weighted};
      }
    }
  }

  float weighted_sum(const float* exponentials, int64_t end) const {
    Vec sum = zero();
    for_weights(end, [&](int64_t i, Vec weights) { sum = fmadd(weights, load(exponentials + i), sum); });
    return reduce_add(sum);
  }

  // Calls f(i, weights) for every vector of the keys [0, end) of the task; weights beyond are zero.
  template <class F>
  void for_weights(int64_t end, F f) const {
    for (int64_t i = 0; i < end; i += kWidth)
      f(i, load_partial(task.weights + task.key_begin + i, static_cast<int>(smaller(end - i, int64_t{kWidth}))));
  }

  static void mass(const DocumentScoresArgs& args, const ScoreTask& task, const SoftmaxState* states, int64_t max_keys,
                   void* scratch) {
    Arena arena{static_cast<char*>(scratch), 0};
    DocumentScores self(args, task, max_keys, false, arena);
    float* const out = args.out + task.key_begin;
    for (int64_t kv_head = 0; kv_head < args.num_kv_heads; ++kv_head) {
      self.pack(kv_head);
      for (int64_t row = 0; row < self.tile_rows(); row += ScoreTile::kTileRows) {
        const int64_t rows = smaller(self.tile_rows() - row, ScoreTile::kTileRows);
        self.score(kv_head, row, rows);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t query = task.order[(row + r) / self.group];
          const SoftmaxState& state = states[query * args.num_query_heads + self.query_head(kv_head, row + r)];
          const Vec scale = set1(1.0f / state.sum);
          float* const scores = self.tile.scores + r * kScoreStride;
          const int64_t high = self.tile.highs[r];
          self.tile.row_maximum(scores, 0, high);  // applies the softcap
          self.tile.row_exponentials(scores, 0, high, state.maximum, scores);
          for (int64_t i = 0; i < high; i += kWidth) {
            const int n = static_cast<int>(smaller(high - i, int64_t{kWidth}));
            store_partial(out + i, fmadd(scale, load(scores + i), load_partial(out + i, n)), n);
          }
        }
      }
    }
    const Vec mean = set1(1.0f / static_cast<float>(task.num_list_rows));
    for (int64_t i = 0; i < self.num_keys; i += kWidth) {
      const int n = static_cast<int>(smaller(self.num_keys - i, int64_t{kWidth}));
      store_partial(out + i, mul(mean, load_partial(out + i, n)), n);
    }
  }

  // The rows that take part are gathered into tiles: heads without a gradient cost nothing, and a NaN that only such
  // rows meet goes nowhere.
  static void backward(const DocumentScoresArgs& args, const ScoreTask& task, int64_t kv_head,
                       const ScoreGradient* gradients, float* grad_query, void* grad_key, int64_t max_keys,
                       void* scratch) {
    Arena arena{static_cast<char*>(scratch), 0};
    DocumentScores self(args, task, max_keys, true, arena);
    bool fresh = true;
    int64_t rows = 0;
    for (int64_t row = 0; row < self.tile_rows(); ++row) {
      if (gradients[self.index(kv_head, row)].factor != 0.0f) {
        self.load_row(kv_head, row, rows);
        self.loaded[rows++] = row;
      }
      if (rows < ScoreTile::kTileRows && (row + 1 < self.tile_rows() || rows == 0)) continue;
      if (fresh) {
        self.pack(kv_head);
        pack_values<FloatPanels, T>(args.key, kv_head, args.head_size, Columns{0, 0, task.key_begin}, 0, self.num_keys,
                                    self.tile.value_stride, self.tile.values);
      }
      self.differentiate_scores(kv_head, rows, gradients);
      self.multiply_by_keys(kv_head, rows, grad_query);
      self.multiply_by_queries(rows, fresh);
      fresh = false;
      rows = 0;
    }
    for (int64_t key = 0; key < self.num_keys; ++key) {
      T* const to = static_cast<T*>(grad_key) + ((task.key_begin + key) * args.num_kv_heads + kv_head) * args.head_size;
      for (int64_t i = 0; i < args.head_size; i += kWidth)
        store_partial(to + i, fresh ? zero() : load(self.grad_keys + key * self.tile.columns + i),
                      static_cast<int>(smaller(args.head_size - i, int64_t{kWidth})));
    }
  }

  // Scores of the loaded rows become gradients for q . k, zero for the keys that a row does not see.
  void differentiate_scores(int64_t kv_head, int64_t rows, const ScoreGradient* gradients) {
    tile.multiply_keys(rows, 0, num_keys);
    const bool capped = args.softcap > 0;
    const Vec scale_log2 = set1(tile.scale_log2), inverse_softcap = set1(capped ? 1.0f / args.softcap : 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const ScoreGradient& gradient = gradients[index(kv_head, loaded[r])];
      const Vec shift = set1(-gradient.maximum), factor = set1(gradient.factor), mean = set1(gradient.mean);
      float* const scores = tile.scores + r * kScoreStride;
      const int64_t high = tile.highs[r];
      if (capped) tile.row_maximum(scores, 0, high);  // applies the softcap
      for (int64_t i = 0; i < high; i += kWidth) {
        const Vec score = load(scores + i);
        Vec result = mul(factor, exp2<FloatPanels::kExpDegree>(fmadd(score, scale_log2, shift)));
        if (capped) {
          const Vec tangent = mul(score, inverse_softcap);
          result = mul(result, fmadd(sub(zero(), tangent), tangent, set1(1.0f)));
        }
        store(scores + i, result);
      }
      if (task.weights)
        for_weights(high,
                    [&](int64_t i, Vec weights) { store(scores + i, mul(load(scores + i), sub(weights, mean))); });
      ScoreTile::clear(scores, high, round_up(num_keys, kRows));
    }
  }

  // grad_query of the loaded rows, which no other tile of the task has.
  void multiply_by_keys(int64_t kv_head, int64_t rows, float* grad_query) {
    for (int64_t row = 0; row < rows; row += FloatPanels::kGroup) {
      const int64_t group_rows = smaller(rows - row, int64_t{FloatPanels::kGroup});
      for (int64_t column = 0; column < tile.columns; column += kColumns)
        FloatPanels::multiply<kScoreStride>(tile.scores + row * kScoreStride,
                                            tile.values + column / kColumns * tile.value_stride,
                                            tile.highs[row + group_rows - 1], tile.accumulators + column, tile.columns,
                                            group_rows, args.head_size - column, false);
      for (int64_t r = 0; r < group_rows; ++r) {
        float* const to = grad_query + index(kv_head, loaded[row + r]) * args.head_size;
        for (int64_t i = 0; i < args.head_size; i += kWidth)
          store_partial(to + i, load(tile.accumulators + r * tile.columns + i),
                        static_cast<int>(smaller(args.head_size - i, int64_t{kWidth})));
      }
    }
  }

  // Adds the loaded rows' part of grad_keys, or makes it the first.
  void multiply_by_queries(int64_t rows, bool fresh) {
    for (int64_t key = 0; key < num_keys; key += kRows)
      for (int64_t column = 0; column < tile.columns; column += kColumns)
        multiply_transposed<kRows, kVectors>(tile.scores + key, tile.queries + column, rows,
                                             grad_keys + key * tile.columns + column, tile.columns, !fresh);
  }

  static ScoreKernels kernels() { return {scratch_bytes, reduce, mass, backward}; }
};
