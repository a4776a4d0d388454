// document_logsumexp and token_attention_mass for one instruction set, on tiles of simd/tile.h. The few query rows meet
// keys in float32: the work is reading the keys once.

template <class T>
struct DocumentScores {
  using ScoreTile = Tile<FloatPanels>;
  const DocumentScoresArgs& args;
  const ScoreTask& task;
  int64_t group;
  ScoreTile tile;

  DocumentScores(const DocumentScoresArgs& args, const ScoreTask& task, int64_t max_keys, Arena arena)
      : args(args),
        task(task),
        group(args.num_query_heads / args.num_kv_heads),
        tile(args.head_size, args.scale, args.softcap, max_keys, false, arena) {}

  static size_t scratch_bytes(const DocumentScoresArgs& args, int64_t max_keys) {
    Arena arena{nullptr, 0};
    ScoreTile(args.head_size, args.scale, args.softcap, max_keys, false, arena);
    return arena.used;
  }

  int64_t tile_rows() const { return task.num_rows * group; }

  void pack(int64_t kv_head) {
    const Columns columns{0, 0, task.key_begin};
    pack_keys<FloatPanels, T>(args.key, kv_head, args.head_size, columns, 0, task.key_end - task.key_begin, tile.depth,
                              tile.keys);
  }

  // Scores of rows [row, row + rows) of the task (times heads) against all its keys. Every row sees the keys up to its
  // own position.
  void score(int64_t kv_head, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t index = task.order[(row + r) / group];
      copy_row<FloatPanels>(row_of<T>(args.query, index, kv_head * group + (row + r) % group), args.head_size,
                            tile.depth, tile.queries + r * kQueryStride);
      tile.lows[r] = 0;
      tile.highs[r] = smaller(args.rows[index] + 1, task.key_end) - task.key_begin;
    }
    // Rows of a task are sorted by position, so highs rise as the tile expects.
    tile.multiply_keys(rows, 0, task.key_end - task.key_begin);
  }

  static void reduce(const DocumentScoresArgs& args, const ScoreTask& task, int64_t kv_head, SoftmaxState* states,
                     int64_t max_keys, void* scratch) {
    DocumentScores self(args, task, max_keys, Arena{static_cast<char*>(scratch), 0});
    self.pack(kv_head);
    for (int64_t row = 0; row < self.tile_rows(); row += ScoreTile::kTileRows) {
      const int64_t rows = smaller(self.tile_rows() - row, ScoreTile::kTileRows);
      self.score(kv_head, row, rows);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t head = kv_head * self.group + (row + r) % self.group;
        float* const scores = self.tile.scores + r * kScoreStride;
        const float maximum = self.tile.row_maximum(scores, 0, self.tile.highs[r]);
        const float sum = self.tile.row_exponentials(scores, 0, self.tile.highs[r], maximum, scores);
        states[(row + r) / self.group * args.num_query_heads + head] = {maximum, sum};
      }
    }
  }

  static void mass(const DocumentScoresArgs& args, const ScoreTask& task, const SoftmaxState* states, int64_t max_keys,
                   void* scratch) {
    DocumentScores self(args, task, max_keys, Arena{static_cast<char*>(scratch), 0});
    float* const out = args.out + task.key_begin;
    const int64_t keys = task.key_end - task.key_begin;
    for (int64_t kv_head = 0; kv_head < args.num_kv_heads; ++kv_head) {
      self.pack(kv_head);
      for (int64_t row = 0; row < self.tile_rows(); row += ScoreTile::kTileRows) {
        const int64_t rows = smaller(self.tile_rows() - row, ScoreTile::kTileRows);
        self.score(kv_head, row, rows);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t head = kv_head * self.group + (row + r) % self.group;
          const SoftmaxState& state = states[task.order[(row + r) / self.group] * args.num_query_heads + head];
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
    for (int64_t i = 0; i < keys; i += kWidth) {
      const int n = static_cast<int>(smaller(keys - i, int64_t{kWidth}));
      store_partial(out + i, mul(mean, load_partial(out + i, n)), n);
    }
  }

  static ScoreKernels kernels() { return {scratch_bytes, reduce, mass}; }
};
