// Gradients of block_attention for one instruction set: the tasks of block_attention_backward.cpp. With the saved lse
// and delta = rowsum(dO out) - dlse, one sweep over the scores S suffices (FlashAttention-2, arXiv 2307.08691,
// section 3.1):
//   P = exp(S - lse), dP = dO V^T, dS = P (dP - delta), dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K.
//
// Scores are held transposed, a key per row: P^T and dS^T enter their products as they are, and lse and delta lie along
// the lanes. Only dS is turned, in registers on its way to memory. A tile of keys stays while all rows that see any of
// it pass by in chunks, so dK and dV of a document never leave the tile before they are final. A key is seen by one
// interval [low, high) of rows, low and high rising along the tile; prefix, own document and tail need no cases.

template <class Panels, class T>
struct BlockAttentionBackward {
  using Element = typename Panels::Element;
  static constexpr int64_t kTileKeys = Panels::kGroup * Panels::kGroups;
  static constexpr int64_t kPaddedKeys = (kTileKeys + kColumns - 1) / kColumns * kColumns;
  static constexpr int64_t kChunkRows = 128;
  static constexpr int kRowStride = kChunkRows + 32, kKeyStride = kPaddedKeys + 32;
  static_assert(kColumns % Panels::kDepthMultiple == 0 && kColumns % kWidth == 0 && kChunkRows % kColumns == 0,
                "ranges rounded to kColumns suit every product");

  // Packed query rows of one segment: Q and dO as columns (for S and dP) and as values (for dK and dV).
  struct Rows {
    int64_t begin, count;  // first token, number of rows
    Element *query_columns, *grad_columns, *query_values, *grad_values;
    float *shift, *delta;  // -lse in units of log2
    float* grad_query;     // sums of dQ
    int64_t value_stride;  // between panels of values
  };

  const BlockAttentionBackwardArgs& args;
  int64_t kv_head, group, head_size;
  int64_t depth;    // head_size padded for products over it
  int64_t columns;  // and for their results
  float scale_log2;
  float softcap_in, softcap_out;  // score = softcap_out * tanh(softcap_in * q.k), where softcap_out > 0
  Rows own, tail;
  float* sums;  // of the slots
  // The tile: K and V row by row, K as values.
  Element *keys, *values, *key_values;
  float *grad_key, *grad_value;
  float *scores, *grad_scores;                    // S^T, dP^T
  Element *probabilities_t, *grad_t, *grad_rows;  // P^T, dS^T, dS
  int64_t *lows, *highs;

  BlockAttentionBackward(const BlockAttentionBackwardArgs& args, const GradientLimits& limits, int64_t kv_head,
                         Arena& arena)
      : args(args),
        kv_head(kv_head),
        group(args.forward.num_query_heads / args.forward.num_kv_heads),
        head_size(args.forward.head_size),
        depth(round_up(head_size, Panels::kDepthMultiple)),
        columns(round_up(head_size, kColumns)) {
    const float scale = args.forward.scale, softcap = args.forward.softcap;
    scale_log2 = softcap > 0 ? kLog2E : scale * kLog2E;
    softcap_in = softcap > 0 ? scale / softcap : 0.0f;
    softcap_out = softcap;
    own = take_rows(limits.segment * group, arena);
    own.grad_query = arena.take<float>(round_up(limits.segment * group, kColumns) * columns);
    tail = take_rows(limits.tail * group, arena);
    sums = arena.take<float>(limits.slot);
    keys = arena.take<Element>(kPaddedKeys * kQueryStride);
    values = arena.take<Element>(kPaddedKeys * kQueryStride);
    key_values = arena.take<Element>(columns * (kPaddedKeys + Panels::kDepthMultiple));
    grad_key = arena.take<float>(kPaddedKeys * columns);
    grad_value = arena.take<float>(kPaddedKeys * columns);
    scores = arena.take<float>(kPaddedKeys * kRowStride);
    grad_scores = arena.take<float>(kPaddedKeys * kRowStride);
    if constexpr (sizeof(Element) == sizeof(float)) {
      probabilities_t = scores;
      grad_t = grad_scores;
    } else {
      probabilities_t = arena.take<Element>(kPaddedKeys * kRowStride);
      grad_t = arena.take<Element>(kPaddedKeys * kRowStride);
    }
    grad_rows = arena.take<Element>(kChunkRows * kKeyStride);
    lows = arena.take<int64_t>(kPaddedKeys);
    highs = arena.take<int64_t>(kPaddedKeys);
  }

  Rows take_rows(int64_t max_rows, Arena& arena) const {
    const int64_t padded = round_up(max_rows, kColumns);
    Rows rows{};
    rows.value_stride = (padded + Panels::kDepthMultiple) * kColumns;
    rows.query_columns = arena.take<Element>(padded * depth);
    rows.grad_columns = arena.take<Element>(padded * depth);
    rows.query_values = arena.take<Element>(columns / kColumns * rows.value_stride);
    rows.grad_values = arena.take<Element>(columns / kColumns * rows.value_stride);
    rows.shift = arena.take<float>(padded);
    rows.delta = arena.take<float>(padded);
    return rows;
  }

  static size_t scratch_bytes(const BlockAttentionArgs& forward, const GradientLimits& limits) {
    Arena arena{nullptr, 0};
    BlockAttentionBackward({forward, {}, nullptr, {}, {}, {}, nullptr}, limits, 0, arena);
    return arena.used;
  }

  static void row_deltas(const BlockAttentionBackwardArgs& args, int64_t begin, int64_t end, float* delta) {
    const BlockAttentionArgs& forward = args.forward;
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t head = 0; head < forward.num_query_heads; ++head) {
        const T* const grad = row_of<T>(args.grad_out, token, head);
        const T* const out = row_of<T>(forward.out, token, head);
        Vec sum = zero();
        for (int64_t i = 0; i < forward.head_size; i += kWidth) {
          const int left = static_cast<int>(smaller(forward.head_size - i, int64_t{kWidth}));
          sum = fmadd(load_partial(grad + i, left), load_partial(out + i, left), sum);
        }
        const int64_t row = token * forward.num_query_heads + head;
        delta[row] = reduce_add(sum) - args.grad_lse[row];
      }
    }
  }

  static void clear(float* p, int64_t count) { __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(float)); }

  void load_rows(Rows& rows, int64_t begin, int64_t end, const float* delta) {
    const BlockAttentionArgs& forward = args.forward;
    rows.begin = begin;
    rows.count = (end - begin) * group;
    const GroupRows run{begin, group};
    pack_keys<Panels, T>(forward.query, kv_head, head_size, run, 0, rows.count, depth, rows.query_columns);
    pack_keys<Panels, T>(args.grad_out, kv_head, head_size, run, 0, rows.count, depth, rows.grad_columns);
    pack_values<Panels, T>(forward.query, kv_head, head_size, run, 0, rows.count, rows.value_stride, rows.query_values);
    pack_values<Panels, T>(args.grad_out, kv_head, head_size, run, 0, rows.count, rows.value_stride, rows.grad_values);
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t at = (begin + r / group) * forward.num_query_heads + kv_head * group + r % group;
      rows.shift[r] = -kLog2E * forward.lse[at];
      rows.delta[r] = delta[at];
    }
  }

  void load_keys(int64_t begin, int64_t count) {
    const BlockAttentionArgs& forward = args.forward;
    for (int64_t i = 0; i < count; ++i) {
      copy_row<Panels>(row_of<T>(forward.key, begin + i, kv_head), head_size, depth, keys + i * kQueryStride);
      copy_row<Panels>(row_of<T>(forward.value, begin + i, kv_head), head_size, depth, values + i * kQueryStride);
    }
    pack_values<Panels, T>(forward.key, kv_head, head_size, GroupRows{begin, 1}, 0, count, key_value_stride(),
                           key_values);
  }

  static constexpr int64_t key_value_stride() { return (kPaddedKeys + Panels::kDepthMultiple) * kColumns; }

  // Adds to all three gradients what `rows` attend to in the loaded tile, the keys [begin, begin + count).
  void attend(const Rows& rows, int64_t begin, int64_t count, float* grad_key, float* grad_value) {
    const int64_t window = args.forward.window;
    const auto first_row = [&](int64_t token) {
      return larger(int64_t{0}, smaller(rows.count, (token - rows.begin) * group));
    };
    const int64_t first = first_row(begin), end = window > 0 ? first_row(begin + count - 1 + window) : rows.count;
    if (first >= end) return;
    for (int64_t chunk = round_down(first, kColumns); chunk < end; chunk += kChunkRows) {
      const int64_t chunk_rows = smaller(rows.count - chunk, kChunkRows);
      for (int64_t i = 0; i < kPaddedKeys; ++i) {
        const int64_t token = begin + i;
        lows[i] = i < count ? larger(int64_t{0}, smaller(chunk_rows, first_row(token) - chunk)) : chunk_rows;
        highs[i] = i < count && window > 0 ? larger(int64_t{0}, smaller(chunk_rows, first_row(token + window) - chunk))
                                           : chunk_rows;
      }
      multiply_rows_by_keys(rows, chunk, count);
      softcap_out > 0 ? soften<true>(rows, chunk, count) : soften<false>(rows, chunk, count);
      add_key_gradients(rows, chunk, count, grad_key, grad_value);
      add_query_gradients(rows, chunk, begin, count);
    }
  }

  // The groups of keys of the tile, with the interval of rows that sees any key of the group.
  template <class F>
  void for_groups(int64_t count, F f) const {
    for (int64_t key = 0; key < count; key += Panels::kGroup) {
      const int64_t group_keys = smaller(count - key, static_cast<int64_t>(Panels::kGroup));
      const int64_t low = lows[key], high = highs[key + group_keys - 1];
      if (low < high) f(key, group_keys, low, high);
    }
  }

  // S^T = K Q^T and dP^T = V dO^T.
  void multiply_rows_by_keys(const Rows& rows, int64_t chunk, int64_t count) {
    const auto multiply = [&](int64_t row, const Element* a, const Element* panels, float* c) {
      for_groups(count, [&](int64_t key, int64_t group_keys, int64_t low, int64_t high) {
        if (low >= row + kColumns || high <= row) return;
        Panels::template multiply<kQueryStride>(a + key * kQueryStride, panels + (chunk + row) * depth, depth,
                                                c + key * kRowStride + row, kRowStride, group_keys, high - row, false);
      });
    };
    for (int64_t row = round_down(lows[0], kColumns); row < highs[count - 1]; row += kColumns) {
      multiply(row, keys, rows.query_columns, scores);
      multiply(row, values, rows.grad_columns, grad_scores);
    }
  }

  // Scores and dP to P and dS, zero where a row does not see a key, for whole panels of the rows that see any.
  template <bool kSoftcap>
  void soften(const Rows& rows, int64_t chunk, int64_t count) {
    const int64_t from = round_down(lows[0], kColumns), to = round_up(highs[count - 1], kColumns);
    for (int64_t key = 0; key < round_up(count, kColumns); key += kWidth) {
      for (int64_t row = from; row < to; row += kWidth) {
        const int64_t last = key + kWidth - 1;
        Vec block[kWidth];
        if (lows[key] >= row + kWidth || highs[last] <= row) {
          for (int i = 0; i < kWidth; ++i) {
            store(probabilities_t + (key + i) * kRowStride + row, zero());
            store(grad_t + (key + i) * kRowStride + row, zero());
            block[i] = zero();
          }
        } else if (lows[last] <= row && highs[key] >= row + kWidth) {
          soften_block<kSoftcap>(rows, chunk, key, row, block, [](Vec x, int64_t) { return x; });
          transpose(block);
        } else {
          soften_block<kSoftcap>(rows, chunk, key, row, block, [&](Vec x, int64_t at) {
            return keep(x, static_cast<int>(lows[at] - row), static_cast<int>(highs[at] - row), zero());
          });
          transpose(block);
        }
        for (int i = 0; i < kWidth; ++i) store(grad_rows + (row + i) * kKeyStride + key, block[i]);
      }
    }
  }

  template <bool kSoftcap, class Keep>
  void soften_block(const Rows& rows, int64_t chunk, int64_t key, int64_t row, Vec (&block)[kWidth], Keep keep_seen) {
    const Vec shift = load(rows.shift + chunk + row), delta = load(rows.delta + chunk + row);
    for (int i = 0; i < kWidth; ++i) {
      const int64_t at = (key + i) * kRowStride + row;
      Vec score = load(scores + at), slope = zero();
      if (kSoftcap) {
        const Vec t = tanh(mul(set1(softcap_in), score));
        score = mul(set1(softcap_out), t);
        slope = sub(set1(1.0f), mul(t, t));
      }
      const Vec p = keep_seen(exp2<Panels::kExpDegree>(fmadd(score, set1(scale_log2), shift)), key + i);
      Vec grad = mul(p, sub(load(grad_scores + at), delta));
      if (kSoftcap) grad = mul(grad, slope);
      block[i] = keep_seen(grad, key + i);
      store(probabilities_t + at, p);
      store(grad_t + at, block[i]);
    }
  }

  // dV += P^T dO and dK += dS^T Q.
  void add_key_gradients(const Rows& rows, int64_t chunk, int64_t count, float* grad_key, float* grad_value) {
    const auto multiply = [&](int64_t panel, const Element* a, const Element* panels, float* c) {
      for_groups(count, [&](int64_t key, int64_t group_keys, int64_t low, int64_t high) {
        const int64_t from = round_down(low, Panels::kDepthMultiple), to = round_up(high, Panels::kDepthMultiple);
        Panels::template multiply<kRowStride>(
            a + key * kRowStride + from, panels + panel * rows.value_stride + (chunk + from) * kColumns, to - from,
            c + key * columns + panel * kColumns, columns, group_keys, head_size - panel * kColumns, true);
      });
    };
    for (int64_t panel = 0; panel < columns / kColumns; ++panel) {
      multiply(panel, probabilities_t, rows.grad_values, grad_value);
      multiply(panel, grad_t, rows.query_values, grad_key);
    }
  }

  // dQ += dS K.
  void add_query_gradients(const Rows& rows, int64_t chunk, int64_t begin, int64_t count) {
    const int64_t window = args.forward.window, end = highs[count - 1];
    const auto token = [&](int64_t row) { return rows.begin + (chunk + row) / group; };
    for (int64_t panel = 0; panel < columns / kColumns; ++panel) {
      for (int64_t row = round_down(lows[0], kColumns); row < end; row += Panels::kGroup) {
        const int64_t group_rows = smaller(end - row, static_cast<int64_t>(Panels::kGroup));
        const int64_t low = window > 0 ? larger(int64_t{0}, token(row) - window + 1 - begin) : 0;
        const int64_t high = smaller(count, token(row + group_rows - 1) + 1 - begin);
        if (low >= high) continue;
        const int64_t from = round_down(low, Panels::kDepthMultiple), to = round_up(high, Panels::kDepthMultiple);
        Panels::template multiply<kKeyStride>(grad_rows + row * kKeyStride + from,
                                              key_values + panel * key_value_stride() + from * kColumns, to - from,
                                              rows.grad_query + (chunk + row) * columns + panel * kColumns, columns,
                                              group_rows, head_size - panel * kColumns, true);
      }
    }
  }

  // Rounds `count` rows of sums, times `scale`, into a gradient.
  void write(const float* sums, int64_t count, float scale, const TokenHeads& gradient, const GroupRows& run) const {
    for (int64_t r = 0; r < count; ++r) {
      T* const to = run.template row<T>(gradient, kv_head, r);
      for (int64_t i = 0; i < head_size; i += kWidth)
        store_partial(to + i, mul(set1(scale), load(sums + r * columns + i)),
                      static_cast<int>(smaller(head_size - i, int64_t{kWidth})));
    }
  }

  void write_queries(const Rows& rows) const {
    write(rows.grad_query, rows.count, args.forward.scale, args.grad_query, {rows.begin, group});
  }

  void write_keys(int64_t begin, int64_t count, const float* grad_key, const float* grad_value) const {
    write(grad_key, count, args.forward.scale, args.grad_key, {begin, 1});
    write(grad_value, count, 1.0f, args.grad_value, {begin, 1});
  }

  // Calls f(first, count) with every tile of the keys [begin, end) loaded.
  template <class F>
  void for_tiles(int64_t begin, int64_t end, F f) {
    for (int64_t first = begin; first < end; first += kTileKeys) {
      const int64_t count = smaller(end - first, kTileKeys);
      load_keys(first, count);
      f(first, count);
    }
  }

  // Keys of a segment that only its own rows and the tail's see.
  void run_segment(int64_t begin, int64_t end) {
    for_tiles(begin, end, [&](int64_t first, int64_t count) {
      clear(grad_key, count * columns);
      clear(grad_value, count * columns);
      attend(own, first, count, grad_key, grad_value);
      attend(tail, first, count, grad_key, grad_value);
      write_keys(first, count, grad_key, grad_value);
    });
  }

  static void run_documents(const BlockAttentionBackwardArgs& args, const GradientTask& task,
                            const GradientLimits& limits, const float* delta, int64_t kv_head, void* scratch) {
    Arena arena{static_cast<char*>(scratch), 0};
    BlockAttentionBackward self(args, limits, kv_head, arena);
    float* const prefix_key = task.slots + kv_head * task.slot.size();
    float* const prefix_value = prefix_key + task.slot.prefix_rows * self.columns;
    clear(prefix_key, task.slot.size());
    self.load_rows(self.tail, task.tail_begin, task.tail_end, delta);
    self.tail.grad_query = prefix_value + task.slot.prefix_rows * self.columns;
    for (int64_t d = 0; d < task.num_documents; ++d) {
      const int64_t begin = task.documents[d], end = task.documents[d + 1];
      self.load_rows(self.own, begin, end, delta);
      clear(self.own.grad_query, self.own.count * self.columns);
      self.for_tiles(task.prefix_begin, task.prefix_end, [&](int64_t first, int64_t count) {
        const int64_t at = (first - task.prefix_begin) * self.columns;
        self.attend(self.own, first, count, prefix_key + at, prefix_value + at);
      });
      self.run_segment(begin, end);
      self.write_queries(self.own);
    }
  }

  static void run_ends(const BlockAttentionBackwardArgs& args, const GradientTask& task, const GradientLimits& limits,
                       const float* delta, int64_t kv_head, void* scratch) {
    Arena arena{static_cast<char*>(scratch), 0};
    BlockAttentionBackward self(args, limits, kv_head, arena);
    float* const prefix_key = self.sums;
    float* const prefix_value = prefix_key + task.slot.prefix_rows * self.columns;
    clear(self.sums, task.slot.size());
    for (int64_t slot = 0; slot < task.num_slots; ++slot) {
      const float* const from = task.slots + (slot * args.forward.num_kv_heads + kv_head) * task.slot.size();
      for (int64_t i = 0; i < task.slot.size(); i += kWidth)
        store(self.sums + i, add(load(self.sums + i), load(from + i)));
    }
    self.load_rows(self.own, task.prefix_begin, task.prefix_end, delta);
    clear(self.own.grad_query, self.own.count * self.columns);
    self.load_rows(self.tail, task.tail_begin, task.tail_end, delta);
    self.tail.grad_query = prefix_value + task.slot.prefix_rows * self.columns;
    self.for_tiles(task.prefix_begin, task.prefix_end, [&](int64_t first, int64_t count) {
      const int64_t at = (first - task.prefix_begin) * self.columns;
      self.attend(self.own, first, count, prefix_key + at, prefix_value + at);
      self.attend(self.tail, first, count, prefix_key + at, prefix_value + at);
      self.write_keys(first, count, prefix_key + at, prefix_value + at);
    });
    self.run_segment(task.tail_begin, task.tail_end);
    self.write_queries(self.own);
    self.write_queries(self.tail);
  }
};
