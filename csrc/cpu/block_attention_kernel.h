// block_attention for one instruction set: the tasks of block_attention.cpp on tiles of simd/tile.h.
// Panels: how products run; T: the type of query, key, value and out.

template <class Panels, class T>
struct BlockAttention {
  const BlockAttentionArgs& args;
  int64_t kv_head, group;
  Tile<Panels> tile;

  BlockAttention(const BlockAttentionArgs& args, int64_t kv_head, int64_t max_keys, Arena arena)
      : args(args),
        kv_head(kv_head),
        group(args.num_query_heads / args.num_kv_heads),
        tile(args.head_size, args.scale, args.softcap, max_keys, true, arena) {}

  static size_t scratch_bytes(const BlockAttentionArgs& args, int64_t max_keys) {
    Arena arena{nullptr, 0};
    Tile<Panels>(args.head_size, args.scale, args.softcap, max_keys, true, arena);
    return arena.used;
  }

  int64_t query_head(int64_t row) const { return kv_head * group + row % group; }

  // Loads rows [row, row + rows) counted from the first row of `token`. Rows of one head lie a whole token apart, where
  // no hardware prefetcher follows, so the rows of the next tile are asked for now and arrive during this tile's work.
  void load_queries(int64_t token, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      copy_row<Panels>(row_of<T>(args.query, token + (row + r) / group, query_head(row + r)), args.head_size,
                       tile.depth, tile.queries + r * kQueryStride);
      const int64_t next = smaller(token + (row + r + rows) / group, args.layout.num_tokens - 1);
      prefetch_row(row_of<T>(args.query, next, query_head(row + r + rows)), args.head_size);
    }
  }

  // First column that a row of `token` sees: only keys less than `window` tokens back. Prefix before segment, so what
  // is left is still one interval.
  int64_t low(const RowSpan& span, int64_t token) const {
    const int64_t first = args.window > 0 ? token - args.window + 1 : 0;
    const int64_t prefix_length = span.prefix_end - span.prefix_begin;
    if (first < span.prefix_end) return larger(first - span.prefix_begin, int64_t{0});
    return prefix_length + larger(first - span.own_begin, int64_t{0});
  }

  void pack(const RowSpan& span, int64_t begin, int64_t end) {
    const Columns columns{span.prefix_begin, span.prefix_end - span.prefix_begin, span.own_begin};
    pack_keys<Panels, T>(args.key, kv_head, args.head_size, columns, begin, end, tile.depth, tile.keys);
    pack_values<Panels, T>(args.value, kv_head, args.head_size, columns, begin, end, tile.value_stride, tile.values);
  }

  // Attention of a span's own rows [row, row + rows), counted from its row_begin, left in the tile's state.
  void attend_own(const RowSpan& span, int64_t row, int64_t rows) {
    load_queries(span.row_begin, row, rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = span.row_begin + (row + r) / group;
      tile.lows[r] = low(span, token);
      tile.highs[r] = span.prefix_end - span.prefix_begin + token - span.own_begin + 1;
      tile.maxima[r] = kNegativeInfinity;
      tile.sums[r] = 0.0f;
    }
    tile.attend(rows, tile.maxima, tile.sums, tile.accumulators, true);
  }

  // Divides by the softmax denominator, with the sink as one more key without value, and writes out and lse.
  void finish(int64_t token, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = query_head(row + r), at = token + (row + r) / group;
      float m = tile.maxima[r], l = tile.sums[r], factor = 1.0f;
      if (args.sinks) {
        const float sink = args.sinks[head] * kLog2E, maximum = larger(m, sink);
        factor = __builtin_exp2f(m - maximum);
        l = l * factor + __builtin_exp2f(sink - maximum);
        m = maximum;
      }
      args.lse[at * args.num_query_heads + head] = m * kLn2 + __builtin_logf(l);
      const Vec scale = set1(factor / l);
      T* out = static_cast<T*>(args.out.data) + at * args.out.token_stride + head * args.out.head_stride;
      const float* acc = tile.accumulators + r * tile.columns;
      for (int64_t i = 0; i < args.head_size; i += kWidth)
        store_partial(out + i, mul(scale, load(acc + i)),
                      static_cast<int>(smaller(args.head_size - i, int64_t{kWidth})));
    }
  }

  static void run_task(const BlockAttentionArgs& args, const AttentionTask& task, int64_t kv_head, int64_t max_keys,
                       void* scratch) {
    BlockAttention self(args, kv_head, max_keys, Arena{static_cast<char*>(scratch), 0});
    const int64_t tail_rows = (task.tail_end - task.tail_begin) * self.group;
    float* const m = tail_rows ? task.slots + kv_head * task.slot.size() : nullptr;
    float* const l = m + task.slot.rows;
    float* const acc = l + task.slot.rows;
    for (int64_t row = 0; row < tail_rows; ++row) {
      m[row] = kNegativeInfinity;
      l[row] = 0.0f;
    }
    bool fresh = true;
    const RowSpan* packed = nullptr;
    for (int64_t i = 0; i < task.num_spans; ++i) {
      const RowSpan& span = task.spans[i];
      if (span.row_begin == span.row_end) continue;
      const int64_t prefix_length = span.prefix_end - span.prefix_begin;
      const int64_t end = prefix_length + span.row_end - span.own_begin;
      int64_t begin = packed ? prefix_length : 0;  // the spans of a task share their prefix
      if (packed && packed->own_begin == span.own_begin) begin += span.row_begin - span.own_begin;
      self.pack(span, begin, end);
      packed = &span;
      const int64_t own_rows = (span.row_end - span.row_begin) * self.group;
      for (int64_t row = 0; row < own_rows; row += Tile<Panels>::kTileRows) {
        const int64_t rows = smaller(own_rows - row, Tile<Panels>::kTileRows);
        self.attend_own(span, row, rows);
        self.finish(span.row_begin, row, rows);
      }
      for (int64_t row = 0; row < tail_rows; row += Tile<Panels>::kTileRows) {
        const int64_t rows = smaller(tail_rows - row, Tile<Panels>::kTileRows);
        self.load_queries(task.tail_begin, row, rows);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t token = task.tail_begin + (row + r) / self.group;
          self.tile.lows[r] = larger(self.low(span, token), prefix_length + span.row_begin - span.own_begin);
          self.tile.highs[r] = end;
        }
        self.tile.attend(rows, m + row, l + row, acc + row * task.slot.columns, fresh);
      }
      fresh = false;
    }
  }

  static void run_tail(const BlockAttentionArgs& args, const TailTask& task, int64_t kv_head, int64_t max_keys,
                       void* scratch) {
    BlockAttention self(args, kv_head, max_keys, Arena{static_cast<char*>(scratch), 0});
    const RowSpan& span = task.span;
    self.pack(span, 0, span.prefix_end - span.prefix_begin + span.row_end - span.own_begin);
    const int64_t own_rows = (span.row_end - span.row_begin) * self.group;
    for (int64_t row = 0; row < own_rows; row += Tile<Panels>::kTileRows) {
      const int64_t rows = smaller(own_rows - row, Tile<Panels>::kTileRows);
      self.attend_own(span, row, rows);
      for (int64_t slot = 0; slot < task.num_slots; ++slot)
        self.merge(task, task.slots + (slot * args.num_kv_heads + kv_head) * task.slot.size(),
                   (span.row_begin - task.tail_begin) * self.group + row, rows);
      self.finish(span.row_begin, row, rows);
    }
  }

  // Adds rows [row, row + rows) of a slot to the tile's state.
  void merge(const TailTask& task, const float* slot, int64_t row, int64_t rows) {
    const float* const l = slot + task.slot.rows;
    const float* const acc = l + task.slot.rows;
    for (int64_t r = 0; r < rows; ++r) {
      if (slot[row + r] == kNegativeInfinity) continue;
      const float maximum = larger(tile.maxima[r], slot[row + r]);
      const float ours = __builtin_exp2f(tile.maxima[r] - maximum), theirs = __builtin_exp2f(slot[row + r] - maximum);
      tile.maxima[r] = maximum;
      tile.sums[r] = tile.sums[r] * ours + l[row + r] * theirs;
      float* sum = tile.accumulators + r * tile.columns;
      for (int64_t i = 0; i < tile.columns; i += kWidth)
        store(sum + i,
              fmadd(set1(theirs), load(acc + (row + r) * task.slot.columns + i), mul(set1(ours), load(sum + i))));
    }
  }

  static AttentionKernels kernels() {
    using Backward = BlockAttentionBackward<Panels, T>;
    return {Panels::kStoredRows,
            kColumns,
            scratch_bytes,
            run_task,
            run_tail,
            Backward::scratch_bytes,
            Backward::row_deltas,
            Backward::run_documents,
            Backward::run_ends};
  }
};
