// lora_shrink and lora_expand for one instruction set. Tiles of kLoraRows x kLoraColumns of x or out pass through L1:
// rows are gathered, widened and masked by dropout once, on their way into a tile, and then both products of shrink run
// on it. A row's results depend on no other row; a gradient's on how its rows are cut into chunks.
#include "simd/arena.h"

constexpr int64_t kRankSlab = 64;  // ranks that a product of expand takes at once
constexpr int64_t kPrefetchTiles = 4;

// Operands of products, in Panels' element type. What is not exact in it is split into kParts that sum to it, each with
// its own sums: those of the small parts round little, and the others as often as without parts.
struct FloatOperands : FloatPanels {
  static constexpr int kParts = 1;
  static constexpr bool kOneTile = true;  // a tile of panels is row-major with stride kSlab: it serves both products
  static constexpr int kSlab = kColumns;
  // A vector of columns of kPair depths, as panels have them.
  static void store_depths(float* to, const Vec (&depths)[1]) { store(to, depths[0]); }
};

// Rows of one product: groups of even size rather than a full one and a remainder that leaves the multipliers waiting.
template <class Panels>
inline int64_t product_rows(int64_t rows) {
  if (Panels::kStoredRows > 1) return Panels::kGroup;
  const int64_t groups = (rows + Panels::kGroup - 1) / Panels::kGroup;
  return (rows + groups - 1) / groups;
}

inline int64_t row_number(const LoraGroup& group, int64_t i) { return group.rows ? group.rows[i] : i; }

inline float keep_scale(const LoraDropout& dropout) { return 65536.0f / static_cast<float>(65536 - dropout.threshold); }

inline Lanes64 all_lanes(uint64_t x) {
  uint64_t lanes[sizeof(Lanes64) / sizeof x];
  for (uint64_t& lane : lanes) lane = x;
  Lanes64 all;
  __builtin_memcpy(&all, lanes, sizeof all);
  return all;
}

// 1 for the elements [128 block, 128 block + 128) of a row that stay, 0 for those dropped: Philox4x32-10 on 16
// counters. Words lie in the low halves of 64-bit lanes; what the rounds leave in the high halves is never read.
inline void draw_mask(const LoraDropout& dropout, int64_t row, int64_t block, float* keep) {
  constexpr int kVectorsOf16 = 16 * sizeof(uint64_t) / sizeof(Lanes64);
  uint64_t words[4][16];
  for (uint64_t i = 0; i < 16; ++i) words[0][i] = 16 * static_cast<uint64_t>(block) + i;
  const Lanes64 row_low = all_lanes(static_cast<uint64_t>(row)), row_high = row_low >> 32;
  const Lanes64 multiplier0 = all_lanes(0xD2511F53), multiplier1 = all_lanes(0xCD9E8D57);
  Lanes64 c0[kVectorsOf16], c1[kVectorsOf16], c2[kVectorsOf16], c3[kVectorsOf16];
  for (int v = 0; v < kVectorsOf16; ++v) {
    __builtin_memcpy(&c0[v], &words[0][16 / kVectorsOf16 * v], sizeof(Lanes64));
    c1[v] = row_low, c2[v] = row_high, c3[v] = all_lanes(0);
  }
  uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Lanes64 key0 = all_lanes(k0), key1 = all_lanes(k1);
#pragma GCC unroll 16
    for (int v = 0; v < kVectorsOf16; ++v) {
      const Lanes64 p0 = multiply_halves(c0[v], multiplier0), p1 = multiply_halves(c2[v], multiplier1);
      c0[v] = (p1 >> 32) ^ c1[v] ^ key0;
      c1[v] = p1;
      c2[v] = (p0 >> 32) ^ c3[v] ^ key1;
      c3[v] = p0;
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  __builtin_memcpy(words[0], c0, sizeof c0);
  __builtin_memcpy(words[1], c1, sizeof c1);
  __builtin_memcpy(words[2], c2, sizeof c2);
  __builtin_memcpy(words[3], c3, sizeof c3);
  for (int64_t w = 0; w < 4; ++w, keep += 32)
    for (int64_t i = 0; i < 16; ++i) {
      const uint32_t word = static_cast<uint32_t>(words[w][i]);
      keep[i] = (word & 0xffff) >= dropout.threshold ? 1.0f : 0.0f;
      keep[16 + i] = (word >> 16) >= dropout.threshold ? 1.0f : 0.0f;
    }
}

// A block of kWidth x kWidth of a strided matrix, row by row; zero beyond `rows` and `columns`.
template <class F>
inline void load_block(const F* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                       Vec (&block)[kWidth]) {
  if (column_stride == 1 || row_stride == 1) {
    const bool by_rows = column_stride == 1;
    const int64_t stride = by_rows ? row_stride : column_stride;
    const int length = static_cast<int>(smaller(by_rows ? columns : rows, int64_t{kWidth}));
    for (int64_t i = 0; i < kWidth; ++i)
      block[i] = i < (by_rows ? rows : columns) ? load_partial(from + i * stride, length) : zero();
    if (!by_rows) transpose(block);
    return;
  }
  for (int64_t i = 0; i < kWidth; ++i) {
    float lanes[kWidth] = {0.0f};
    for (int64_t j = 0; i < rows && j < smaller(columns, int64_t{kWidth}); ++j)
      lanes[j] = to_float(from[i * row_stride + j * column_stride]);
    block[i] = load(lanes);
  }
}

// The opposite. The block is used up.
template <class F>
inline void store_block(Vec (&block)[kWidth], F* to, int64_t row_stride, int64_t column_stride, int64_t rows,
                        int64_t columns) {
  if (column_stride == 1 || row_stride == 1) {
    const bool by_rows = column_stride == 1;
    if (!by_rows) transpose(block);
    const int64_t stride = by_rows ? row_stride : column_stride;
    const int length = static_cast<int>(smaller(by_rows ? columns : rows, int64_t{kWidth}));
    for (int64_t i = 0; i < smaller(by_rows ? rows : columns, int64_t{kWidth}); ++i)
      store_partial(to + i * stride, block[i], length);
    return;
  }
  for (int64_t i = 0; i < smaller(rows, int64_t{kWidth}); ++i) {
    float lanes[kWidth];
    store(lanes, block[i]);
    for (int64_t j = 0; j < smaller(columns, int64_t{kWidth}); ++j)
      assign(to[i * row_stride + j * column_stride], lanes[j]);
  }
}

// T: of x and out. F: of factors and gradients.
template <class Panels, class T, class F>
struct LoraLinear {
  using Element = typename Panels::Element;
  static constexpr int kParts = Panels::kParts, kPair = Panels::kPair;
  // Rank rows of a staged or packed factor.
  static int64_t padded(int64_t rank) { return round_up(rank, larger(kColumns, Panels::kDepthMultiple)); }
  // Those of a panel that products read.
  static int64_t read_ranks(int64_t rank) {
    return round_up(rank, Panels::kDepthMultiple > kWidth || rank % kColumns > kWidth ? kColumns : kWidth);
  }
  static int64_t padded_size(int64_t size) { return round_up(size, kLoraColumns); }

  struct Buffers {
    Element *rows, *panels;  // a tile of x: row-major in slabs of kSlab columns, and as panels
    float* sums;             // of rows
    float* products;         // of each part, what a tile adds to sums; or a tile of the update
    int64_t products_size;   // of one part
    float* coefficients;     // of some rows, a group's factors side by side
    Element* left;           // the same as left operand of a product
    int64_t left_size;       // of one part
    float* staged;           // columns of factors, or of the gradients of a chunk of rows
    float* totals;           // columns of the gradients of the chunks before
    float* keep;             // what dropout leaves of a row's columns
    size_t bytes;

    Buffers(int64_t rank, void* memory) {
      Arena arena{static_cast<char*>(memory), 0};
      const int64_t ranks = round_up(padded(rank), kRankSlab);
      rows = arena.take<Element>(kLoraRows * kLoraColumns);
      panels = Panels::kOneTile ? rows : arena.take<Element>(kLoraRows * kLoraColumns);
      sums = arena.take<float>(kLoraRows * padded(rank));
      products_size = kLoraRows * padded(rank);
      products = arena.take<float>(larger(kParts * products_size, kLoraRows * kLoraColumns));
      coefficients = arena.take<float>(kLoraRows * ranks);
      left_size = kLoraRows * ranks;
      left = arena.take<Element>(kParts * left_size);
      staged = arena.take<float>(kParts * padded(rank) * kLoraColumns);
      totals = arena.take<float>(kParts * padded(rank) * kLoraColumns);
      keep = arena.take<float>(kLoraColumns);
      bytes = arena.used;
    }
  };

  static size_t packed_bytes(int64_t rank, int64_t size) {
    return static_cast<size_t>(kParts * padded(rank) * padded_size(size)) * sizeof(Element);
  }
  static size_t scratch_bytes(int64_t rank) { return Buffers(rank, nullptr).bytes; }
  static size_t partial_bytes(int64_t rank, int64_t size) {
    return static_cast<size_t>(kParts * padded(rank) * padded_size(size)) * sizeof(float);
  }

  // Columns [column, column + kLoraColumns) of all factors as float32, zero where there are none.
  static void stage(const LoraGroup& group, int64_t size, int64_t column, float* staged) {
    int64_t end = 0;
    const int64_t left = size - column;
    for (int64_t j = 0; j < group.num_factors; ++j) {
      const LoraFactor& factor = group.factors[j];
      for (int64_t rank = 0; rank < factor.rank; rank += kWidth) {
        for (int64_t k = 0; k < kLoraColumns; k += kWidth) {
          Vec block[kWidth];
          load_block(static_cast<const F*>(factor.data) + rank * factor.rank_stride + (column + k) * factor.size_stride,
                     factor.rank_stride, factor.size_stride, factor.rank - rank, left - k, block);
          for (int64_t i = 0; i < smaller(factor.rank - rank, int64_t{kWidth}); ++i)
            store(staged + (end + rank + i) * kLoraColumns + k, block[i]);
        }
      }
      end += factor.rank;
    }
    __builtin_memset(staged + end * kLoraColumns, 0,
                     static_cast<size_t>((read_ranks(end) - end) * kLoraColumns) * sizeof(float));
  }

  // Stores kWidth columns of kWidth depths into every part's panels.
  static void store_parts(Vec (&depths)[kWidth], Element* to, int64_t part_size) {
    for (int part = 0; part < kParts; ++part, to += part_size) {
      for (int k = 0; k < kWidth; k += kPair) {
        Vec pair[kPair];
        for (int i = 0; i < kPair; ++i) pair[i] = depths[k + i];
        Panels::store_depths(to + k * kColumns, pair);
      }
      if (part + 1 < kParts)
        for (int k = 0; k < kWidth; ++k) depths[k] = rest(depths[k]);
    }
  }
  // What a part leaves for the next.
  static Vec rest(Vec x) {
    Element rounded[kWidth];
    store(rounded, x);
    return sub(x, load(rounded));
  }

  // Panels of ranks with depth size.
  static void pack_shrink(const LoraGroup& group, int64_t size, int64_t column, void* scratch) {
    const Buffers s(group.rank, scratch);
    stage(group, size, column, s.staged);
    const int64_t part_size = padded(group.rank) * padded_size(size);
    for (int64_t rank = 0; rank < read_ranks(group.rank); rank += kWidth) {
      Element* const panel = static_cast<Element*>(group.packed) + round_down(rank, kColumns) * padded_size(size) +
                             rank % kColumns * kPair;
      for (int64_t k = 0; k < kLoraColumns; k += kWidth) {
        Vec block[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) block[i] = load(s.staged + (rank + i) * kLoraColumns + k);
        transpose(block);
        store_parts(block, panel + (column + k) * kColumns, part_size);
      }
    }
  }

  // Panels of columns with depth rank.
  static void pack_expand(const LoraGroup& group, int64_t size, int64_t column, void* scratch) {
    const Buffers s(group.rank, scratch);
    stage(group, size, column, s.staged);
    const int64_t ranks = padded(group.rank), part_size = ranks * padded_size(size);
    for (int64_t k = 0; k < kLoraColumns; k += kWidth) {
      Element* const panel =
          static_cast<Element*>(group.packed) + round_down(column + k, kColumns) * ranks + k % kColumns * kPair;
      for (int64_t rank = 0; rank < read_ranks(group.rank); rank += kWidth) {
        Vec block[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) block[i] = load(s.staged + (rank + i) * kLoraColumns + k);
        store_parts(block, panel + rank * kColumns, part_size);
      }
    }
  }

  // Coefficients of a row's ranks times `scale` of each factor, zero up to `ranks`.
  template <class Scale>
  static void gather_coefficients(const LoraGroup& group, const float* from, int64_t ranks, Scale scale, float* to) {
    int64_t end = 0;
    for (int64_t j = 0; j < group.num_factors; ++j) {
      const LoraFactor& factor = group.factors[j];
      const Vec times = set1(scale(factor));
      for (int64_t r = 0; r < factor.rank; r += kWidth) {
        const int left = static_cast<int>(smaller(factor.rank - r, int64_t{kWidth}));
        store_partial(to + end + r, mul(times, load_partial(from + factor.column + r, left)), left);
      }
      end += factor.rank;
    }
    for (; end < ranks; ++end) to[end] = 0.0f;
  }

  // A row's part of a tile, into L2. Rows lie apart: the processor does not see that the next tiles continue them.
  static void prefetch(const T* from) {
    for (int64_t k = 0; k < kLoraColumns; k += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + k, 0, 2);
  }

  // Rows [begin, begin + rows) of a group, columns [column, column + kLoraColumns); zero beyond size, and as panels for
  // the rows up to kDepthMultiple.
  static void load_tile(const LoraShrinkArgs& args, const LoraGroup& group, int64_t begin, int64_t rows, int64_t column,
                        const Buffers& s) {
    const int64_t left = args.size - column;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = row_number(group, begin + i);
      const T* const from = static_cast<const T*>(args.x) + row * args.x_stride + column;
      prefetch(from + kPrefetchTiles * kLoraColumns);
      if (Panels::kSlab == kLoraColumns && left >= kLoraColumns && !args.dropout.threshold) {
        static_assert(Panels::kSlab != kLoraColumns || sizeof(T) == sizeof(Element), "copied as they are");
        __builtin_memcpy(s.rows + i * kLoraColumns, from, kLoraColumns * sizeof(T));
        continue;
      }
      if (args.dropout.threshold) draw_mask(args.dropout, row, column / kLoraColumns, s.keep);
      for (int64_t k = 0; k < kLoraColumns; k += kWidth) {
        Vec x = left - k >= kWidth ? load(from + k) : load_partial(from + k, static_cast<int>(left - k));
        if (args.dropout.threshold) x = mul(x, load(s.keep + k));
        store(s.rows + round_down(k, Panels::kSlab) * kLoraRows + i * Panels::kSlab + k % Panels::kSlab, x);
      }
    }
    if constexpr (!Panels::kOneTile) {
      for (int64_t i = 0; i < round_up(rows, Panels::kDepthMultiple); i += kPair) {
        const Element* pair[kPair];
        for (int64_t r = 0; r < kPair; ++r) pair[r] = i + r < rows ? s.rows + (i + r) * Panels::kSlab : nullptr;
        for (int64_t k = 0; k < kLoraColumns; k += kColumns)
          Panels::store_values(s.panels + k * kLoraRows + i * kColumns, pair, k, kLoraColumns - k);
      }
    }
  }

  // sums += tile times factors. Each tile is summed on its own first: of two short sums less is lost than of a long
  // one.
  static void multiply_sums(const LoraGroup& group, int64_t size, int64_t rows, int64_t column, int64_t columns,
                            const Buffers& s) {
    const int64_t stride = padded(group.rank), together = product_rows<Panels>(rows);
    for (int64_t rank = 0; rank < group.rank; rank += kColumns)
      for (int64_t k = 0; k < columns; k += Panels::kSlab)
        for (int64_t i = 0; i < rows; i += together)
          for (int part = 0; part < kParts; ++part)
            Panels::template multiply<Panels::kSlab>(
                s.rows + k * kLoraRows + i * Panels::kSlab,
                static_cast<const Element*>(group.packed) + (part * stride + rank) * padded_size(size) +
                    (column + k) * kColumns,
                Panels::kSlab, s.products + part * s.products_size + i * stride + rank, stride,
                smaller(together, rows - i), group.rank - rank, k > 0);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t rank = i * stride; rank < i * stride + group.rank; rank += kWidth) {
        Vec sum = load(s.sums + rank);
        for (int part = 0; part < kParts; ++part) sum = add(sum, load(s.products + part * s.products_size + rank));
        store(s.sums + rank, sum);
      }
  }

  // partial (+)= coefficients^T times tile, for each part.
  static void multiply_gradients(const LoraGroup& group, int64_t rows, int64_t columns, float* partial, int64_t stride,
                                 bool accumulate, const Buffers& s) {
    const int64_t part_size = padded(group.rank) * stride;
    const int64_t together = product_rows<Panels>(group.rank);
    for (int64_t k = 0; k < columns; k += kColumns)
      for (int64_t rank = 0; rank < group.rank; rank += together)
        for (int part = 0; part < kParts; ++part)
          Panels::template multiply<kLoraRows>(s.left + part * s.left_size + rank * kLoraRows, s.panels + k * kLoraRows,
                                               round_up(rows, Panels::kDepthMultiple),
                                               partial + part * part_size + rank * stride + k, stride,
                                               smaller(together, group.rank - rank), columns - k, accumulate);
  }

  // The coefficients of rows [begin, begin + rows) as left operand of multiply_gradients, [rank][row].
  static void transpose_coefficients(const LoraShrinkArgs& args, const LoraGroup& group, int64_t begin, int64_t rows,
                                     const Buffers& s) {
    const int64_t ranks = padded(group.rank);
    for (int64_t i = 0; i < rows; ++i)
      gather_coefficients(
          group, args.coefficients + row_number(group, begin + i) * args.coefficients_stride, ranks,
          [](const LoraFactor&) { return 1.0f; }, s.coefficients + i * ranks);
    __builtin_memset(s.coefficients + rows * ranks, 0, static_cast<size_t>((kLoraRows - rows) * ranks) * sizeof(float));
    for (int64_t i = 0; i < kLoraRows; i += kWidth)
      for (int64_t rank = 0; rank < ranks; rank += kWidth) {
        Vec block[kWidth];
        for (int64_t r = 0; r < kWidth; ++r) block[r] = load(s.coefficients + (i + r) * ranks + rank);
        transpose(block);
        for (int64_t r = 0; r < kWidth; ++r) store_left(block[r], s.left + (rank + r) * kLoraRows + i, s.left_size);
      }
  }
  static void store_left(Vec x, Element* to, int64_t part_size) {
    for (int part = 0; part < kParts; ++part, to += part_size) {
      store(to, x);
      if (part + 1 < kParts) x = rest(x);
    }
  }

  static void store_sums(const LoraShrinkArgs& args, const LoraGroup& group, const float* from, int64_t row) {
    float* const to = args.sums + row * args.sums_stride;
    __builtin_memset(to, 0, static_cast<size_t>(args.width) * sizeof(float));
    for (int64_t j = 0; j < group.num_factors; ++j) {
      const LoraFactor& factor = group.factors[j];
      const Vec scale = set1(factor.scale * keep_scale(args.dropout));
      for (int64_t r = 0; r < factor.rank; r += kWidth) {
        const int left = static_cast<int>(smaller(factor.rank - r, int64_t{kWidth}));
        store_partial(to + factor.column + r, mul(scale, load_partial(from + r, left)), left);
      }
      from += factor.rank;
    }
  }

  static void shrink(const LoraShrinkArgs& args, const LoraGroup& group, int64_t begin, int64_t end, float* partial,
                     void* scratch) {
    const Buffers s(group.rank, scratch);
    const int64_t stride = padded(group.rank);
    for (int64_t i = begin; i < end; i += kLoraRows) {
      const int64_t rows = smaller(end - i, kLoraRows);
      __builtin_memset(s.sums, 0, static_cast<size_t>(kLoraRows * stride) * sizeof(float));
      if (partial) transpose_coefficients(args, group, i, rows, s);
      for (int64_t column = 0; group.rank > 0 && column < args.size; column += kLoraColumns) {
        const int64_t columns = smaller(args.size - column, kLoraColumns);
        load_tile(args, group, i, rows, column, s);
        multiply_sums(group, args.size, rows, column, columns, s);
        if (partial) multiply_gradients(group, rows, columns, partial + column, padded_size(args.size), i > begin, s);
      }
      for (int64_t r = 0; r < rows; ++r) store_sums(args, group, s.sums + r * stride, row_number(group, i + r));
    }
  }

  // Columns [column, column + kLoraColumns) of the gradients: scale times the sum of `count` partial ones.
  static void store_gradients(const LoraShrinkArgs& args, const LoraGroup& group, const float* parts, int64_t count,
                              int64_t stride, int64_t column) {
    const int64_t part_size = padded(group.rank) * stride;
    const int64_t columns = smaller(args.size - column, kLoraColumns);
    for (int64_t j = 0; j < group.num_factors; parts += group.factors[j++].rank * stride) {
      const LoraFactor& factor = group.factors[j];
      const Vec scale = set1(factor.scale * keep_scale(args.dropout));
      for (int64_t rank = 0; factor.gradient && rank < factor.rank; rank += kWidth)
        for (int64_t k = 0; k < columns; k += kWidth) {
          const int64_t ranks = smaller(factor.rank - rank, int64_t{kWidth});
          Vec block[kWidth];
          for (int64_t i = 0; i < kWidth; ++i) {
            Vec sum = zero();
            for (int64_t part = 0; i < ranks && part < kParts * count; ++part)
              sum = add(sum, load(parts + part * part_size + (rank + i) * stride + k));
            block[i] = mul(scale, sum);
          }
          F* const to = static_cast<F*>(factor.gradient) + rank * factor.gradient_rank_stride +
                        (column + k) * factor.gradient_size_stride;
          store_block(block, to, factor.gradient_rank_stride, factor.gradient_size_stride, ranks, columns - k);
        }
    }
  }

  static void add_partials(const LoraShrinkArgs& args, const LoraGroup& group, const float* partials, int64_t count,
                           int64_t column) {
    store_gradients(args, group, partials + column, count, padded_size(args.size), column);
  }

  // Chunks of rows are summed on their own first, as partial gradients are.
  static void gradients(const LoraShrinkArgs& args, const LoraGroup& group, int64_t column, void* scratch) {
    const Buffers s(group.rank, scratch);
    const int64_t elements = kParts * padded(group.rank) * kLoraColumns;
    for (int64_t k = 0; k < elements; k += kWidth) store(s.totals + k, zero());
    for (int64_t i = 0; i < group.num_rows; i += kLoraRows) {
      const int64_t end = smaller(group.num_rows, i + kLoraRows);
      transpose_coefficients(args, group, i, end - i, s);
      load_tile(args, group, i, end - i, column, s);
      multiply_gradients(group, end - i, smaller(args.size - column, kLoraColumns), s.staged, kLoraColumns,
                         i % kLoraChunk > 0, s);
      if (end % kLoraChunk == 0 || end == group.num_rows)
        for (int64_t k = 0; k < elements; k += kWidth) store(s.totals + k, add(load(s.totals + k), load(s.staged + k)));
    }
    store_gradients(args, group, s.totals, 1, kLoraColumns, column);
  }

  // update = coefficients times factors, for columns [column, column + columns).
  static void multiply_update(const LoraGroup& group, int64_t size, int64_t rows, int64_t column, int64_t columns,
                              const Buffers& s) {
    const int64_t ranks = padded(group.rank), together = product_rows<Panels>(rows);
    for (int64_t k = 0; k < columns; k += kColumns)
      for (int64_t i = 0; i < rows; i += together)
        for (int64_t rank = 0; rank < group.rank; rank += kRankSlab) {
          const int64_t depth =
              round_up(smaller(group.rank - rank, kRankSlab), static_cast<int64_t>(Panels::kDepthMultiple));
          // The product of the parts p and q is below 2^(-8 (p + q)) of the whole: with p + q < 2, what is left out
          // is below 2^-16, where the result is rounded to bfloat16.
          for (int p = 0; p < smaller(kParts, 2); ++p)
            for (int q = 0; q < smaller(kParts, 2) - p; ++q)
              Panels::template multiply<kRankSlab>(s.left + p * s.left_size + rank * kLoraRows + i * kRankSlab,
                                                   static_cast<const Element*>(group.packed) +
                                                       q * ranks * padded_size(size) + (column + k) * ranks +
                                                       rank * kColumns,
                                                   depth, s.products + i * kLoraColumns + k, kLoraColumns,
                                                   smaller(together, rows - i), columns - k, rank + p + q > 0);
        }
  }

  // out += update, where dropout keeps it.
  static void add_update(const LoraExpandArgs& args, int64_t row, int64_t column, int64_t columns, const float* update,
                         const Buffers& s) {
    if (args.dropout.threshold) draw_mask(args.dropout, row, column / kLoraColumns, s.keep);
    T* const out = static_cast<T*>(args.out) + row * args.out_stride + column;
    const auto add_vector = [&](int64_t k, Vec old) {
      const Vec change = load(update + k);
      return args.dropout.threshold ? fmadd(change, load(s.keep + k), old) : add(change, old);
    };
    int64_t k = 0;
    for (; k + kWidth <= columns; k += kWidth) store(out + k, add_vector(k, load(out + k)));
    const int left = static_cast<int>(columns - k);
    if (left > 0) store_partial(out + k, add_vector(k, load_partial(out + k, left)), left);
  }

  static void expand(const LoraExpandArgs& args, const LoraGroup& group, int64_t begin, int64_t end, int64_t column,
                     int64_t column_end, void* scratch) {
    const Buffers s(group.rank, scratch);
    const int64_t ranks = padded(group.rank);
    const float kept = keep_scale(args.dropout);
    for (int64_t i = begin; i < end; i += kLoraRows) {
      const int64_t rows = smaller(end - i, kLoraRows);
      for (int64_t r = 0; r < rows; ++r) {
        const float* const from = args.coefficients + row_number(group, i + r) * args.coefficients_stride;
        gather_coefficients(
            group, from, ranks, [kept](const LoraFactor& factor) { return factor.scale * kept; }, s.coefficients);
        for (int64_t rank = 0; rank < ranks; rank += kWidth)
          store_left(load(s.coefficients + rank),
                     s.left + round_down(rank, kRankSlab) * kLoraRows + r * kRankSlab + rank % kRankSlab, s.left_size);
      }
      for (int64_t k = column; k < column_end; k += kLoraColumns) {
        const int64_t columns = smaller(column_end - k, kLoraColumns);
        for (int64_t r = 0; r < rows; ++r)
          prefetch(static_cast<const T*>(args.out) + row_number(group, i + r) * args.out_stride + k);
        multiply_update(group, args.size, rows, k, columns, s);
        for (int64_t r = 0; r < rows; ++r)
          add_update(args, row_number(group, i + r), k, columns, s.products + r * kLoraColumns, s);
      }
    }
  }

  static LoraKernels kernels() {
    return {packed_bytes, partial_bytes, scratch_bytes, pack_shrink, pack_expand,
            shrink,       add_partials,  gradients,     expand};
  }
};

template <class Panels, class T>
LoraKernels kernels_of(DType factor_dtype) {
  if (factor_dtype == DType::kFloat32) return LoraLinear<Panels, T, float>::kernels();
  return LoraLinear<Panels, T, T>::kernels();
}

inline LoraKernels float_kernels(DType dtype, DType factor_dtype) {
  if (dtype == DType::kBFloat16) return kernels_of<FloatOperands, BFloat16>(factor_dtype);
  if (dtype == DType::kFloat16) return kernels_of<FloatOperands, Float16>(factor_dtype);
  return kernels_of<FloatOperands, float>(factor_dtype);
}
