// From strided [token, head, head_size] tensors to panels (panels.h) and row-major tiles.

template <class T>
inline const T* row_of(const TokenHeads& tensor, int64_t token, int64_t head) {
  return static_cast<const T*>(tensor.data) + token * tensor.token_stride + head * tensor.head_stride;
}

template <class T>
inline void prefetch_row(const T* row, int64_t elements) {
  for (int64_t byte = 0; byte < elements * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 2);
}

// Tokens that packing prefetches ahead. Documents follow each other, so this reaches into the next one.
constexpr int64_t kPrefetchTokens = 48;

// The keys that rows of a span see, as one run of columns: first the prefix, then the segment.
struct Columns {
  int64_t prefix_begin, prefix_length, own_begin;
  int64_t token(int64_t column) const {
    return column < prefix_length ? prefix_begin + column : own_begin + column - prefix_length;
  }
  template <class T>
  const T* row(const TokenHeads& tensor, int64_t head, int64_t column) const {
    return row_of<T>(tensor, token(column), head);
  }
};

// The rows (token, query head of a KV head's group), token-major from token `begin` on.
struct GroupRows {
  int64_t begin, group;
  template <class T>
  T* row(const TokenHeads& tensor, int64_t kv_head, int64_t r) const {
    return const_cast<T*>(row_of<T>(tensor, begin + r / group, kv_head * group + r % group));
  }
};

// Keys [begin, end) as panels of `depth` x kColumns, zero beyond `end` and beyond head_size; begin is rounded down to a
// whole panel. Blocks of kWidth keys x kWidth 32-bit units (one float32, or a pair of bfloat16) are transposed.
template <class Panels, class T, class Run>
void pack_keys(const TokenHeads& key, int64_t head, int64_t head_size, const Run& columns, int64_t begin, int64_t end,
               int64_t depth, typename Panels::Element* panels) {
  for (int64_t first = round_down(begin, kColumns); first < end; first += kColumns) {
    for (int v = 0; v < kVectors; ++v) {
      const T* rows[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int64_t column = first + v * kWidth + i;
        rows[i] = column < end ? columns.template row<T>(key, head, column) : nullptr;
        if (rows[i]) prefetch_row(rows[i] + kPrefetchTokens * key.token_stride, head_size);
      }
      typename Panels::Element* panel = panels + first * depth + v * kWidth * Panels::kPair;
      for (int64_t unit = 0; unit < depth / Panels::kPair; unit += kWidth) {
        const int64_t left = head_size - unit * Panels::kPair;
        Vec block[kWidth];
        for (int i = 0; i < kWidth; ++i)
          block[i] = rows[i] ? Panels::load_units(rows[i] + unit * Panels::kPair, left) : zero();
        transpose(block);
        const int64_t units = smaller(depth / Panels::kPair - unit, static_cast<int64_t>(kWidth));
        for (int64_t i = 0; i < units; ++i)
          store(reinterpret_cast<float*>(panel + (unit + i) * kColumns * Panels::kPair), block[i]);
      }
    }
  }
}

// Values [begin, end) as panels of keys x kColumns head elements, `panel_stride` elements apart, zero for the
// kDepthMultiple keys after `end`, which products may read; begin is rounded down to a pair.
template <class Panels, class T, class Run>
void pack_values(const TokenHeads& value, int64_t head, int64_t head_size, const Run& columns, int64_t begin,
                 int64_t end, int64_t panel_stride, typename Panels::Element* panels) {
  constexpr int kPair = Panels::kPair;
  const int64_t padded = round_up(end, kPair) + Panels::kDepthMultiple;
  for (int64_t column = round_down(begin, kPair); column < padded; column += kPair) {
    const T* rows[kPair];
    for (int i = 0; i < kPair; ++i) {
      rows[i] = column + i < end ? columns.template row<T>(value, head, column + i) : nullptr;
      if (rows[i]) prefetch_row(rows[i] + kPrefetchTokens * value.token_stride, head_size);
    }
    for (int64_t element = 0; element < head_size; element += kColumns) {
      typename Panels::Element* to = panels + element / kColumns * panel_stride + column * kColumns;
      Panels::store_values(to, rows, element, head_size - element);
    }
  }
}

// One row of `depth` elements, zero beyond head_size.
template <class Panels, class T>
inline void copy_row(const T* from, int64_t head_size, int64_t depth, typename Panels::Element* to) {
  constexpr int64_t kUnits = kWidth * Panels::kPair;
  for (int64_t element = 0; element < depth; element += kUnits)
    store(reinterpret_cast<float*>(to + element), Panels::load_units(from + element, head_size - element));
}
