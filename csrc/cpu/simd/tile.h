// A tile of query rows against packed keys: scores, softmax over whole rows, weighted sum of values.
//
// Rows are (token, query head of the KV head's group), token-major, so grouped-query heads share every load of K and V.
// Scores of up to kBlock keys are held at once: a document with its prefix usually fits, and then each row has one
// maximum, one sweep of exponentials and no rescaling. Longer rows continue block by block with the online softmax
// recurrence. What a row sees is one interval [low, high) of columns, with low and high rising along the tile; products
// skip the panels outside, so only panels on the diagonal hold masked scores.
#include "arena.h"
#include "math.h"
#include "panels.h"
#include "packing.h"

constexpr int64_t kBlock = 512;
constexpr int64_t kMaxHeadSize = 256;
constexpr int kQueryStride = kMaxHeadSize + 32;  // not a power of two: rows of a tile fall into different cache sets
constexpr int kScoreStride = kBlock + 32 + 16;

template <class Panels>
struct Tile {
  using Element = typename Panels::Element;
  static constexpr int64_t kTileRows = Panels::kGroup * Panels::kGroups;

  int64_t head_size;
  int64_t depth;                  // head_size padded for Q K^T
  int64_t columns;                // head_size padded for P V
  int64_t value_stride;           // between panels of values
  float scale_log2;               // multiplies scores before exp2
  float softcap_in, softcap_out;  // score = softcap_out * tanh(softcap_in * q.k), where softcap_out > 0
  Element* queries;
  float* scores;
  Element* probabilities;  // the scores themselves where elements are float32
  float *maxima, *sums, *accumulators;
  int64_t *lows, *highs;
  Element *keys, *values;

  // has_values: whether a product with V follows.
  Tile(int64_t head_size, float scale, float softcap, int64_t max_keys, bool has_values, Arena& arena)
      : head_size(head_size) {
    depth = round_up(head_size, Panels::kDepthMultiple);
    columns = round_up(head_size, kColumns);
    const int64_t max_columns = round_up(max_keys, kColumns) + Panels::kDepthMultiple;
    value_stride = max_columns * kColumns;
    scale_log2 = softcap > 0 ? kLog2E : scale * kLog2E;
    softcap_in = softcap > 0 ? scale / softcap : 0.0f;
    softcap_out = softcap;
    queries = arena.take<Element>(kTileRows * kQueryStride);
    scores = arena.take<float>(kTileRows * kScoreStride);
    if constexpr (sizeof(Element) == sizeof(float)) {
      probabilities = scores;
    } else {
      probabilities = arena.take<Element>(has_values ? kTileRows * kScoreStride : 0);
    }
    maxima = arena.take<float>(kTileRows);
    sums = arena.take<float>(kTileRows);
    accumulators = arena.take<float>(has_values ? kTileRows * columns : 0);
    lows = arena.take<int64_t>(kTileRows);
    highs = arena.take<int64_t>(kTileRows);
    keys = arena.take<Element>(round_up(max_keys, kColumns) * depth);
    values = arena.take<Element>(has_values ? columns / kColumns * value_stride : 0);
  }

  // Scores of the columns [begin, begin + kBlock) that any row sees, begin a multiple of kColumns.
  void multiply_keys(int64_t rows, int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; column += kColumns) {
      for (int64_t row = 0; row < rows; row += Panels::kGroup) {
        const int64_t group_rows = smaller(rows - row, static_cast<int64_t>(Panels::kGroup));
        if (lows[row] >= column + kColumns || highs[row + group_rows - 1] <= column) continue;
        Panels::template multiply<kQueryStride>(queries + row * kQueryStride, keys + column * depth, depth,
                                                scores + row * kScoreStride + (column - begin), kScoreStride,
                                                group_rows, highs[row + group_rows - 1] - column, false);
      }
    }
  }

  // Maximum of scores[begin, end) of a row, times scale_log2; applies the softcap in place.
  float row_maximum(float* row, int64_t begin, int64_t end) const {
    Vec maximum = set1(kNegativeInfinity);
    if (softcap_out > 0) {
      for (int64_t column = round_down(begin, kWidth); column < end; column += kWidth)
        store(row + column, mul(set1(softcap_out), tanh(mul(set1(softcap_in), load(row + column)))));
    }
    for_vectors(begin, end, [&](int64_t column, auto keep_lanes) {
      maximum = max(maximum, keep_lanes(load(row + column), set1(kNegativeInfinity)));
    });
    return reduce_max(maximum) * scale_log2;
  }

  // out[begin, end) = exp2(score * scale_log2 - maximum), zero in the rest of the touched vectors; returns the sum.
  template <class Out>
  float row_exponentials(const float* row, int64_t begin, int64_t end, float maximum, Out* out) const {
    Vec sum = zero();
    const Vec factor = set1(scale_log2), shift = set1(-maximum);
    for_vectors(begin, end, [&](int64_t column, auto keep_lanes) {
      const Vec p = keep_lanes(exp2<Panels::kExpDegree>(fmadd(load(row + column), factor, shift)), zero());
      sum = add(sum, p);
      store(out + column, p);
    });
    return reduce_add(sum);
  }

  // Calls f(column, keep_lanes) for the vectors that overlap [begin, end); keep_lanes(x, fill) replaces the lanes of x
  // outside, and is free for the vectors wholly inside.
  template <class F>
  static void for_vectors(int64_t begin, int64_t end, F f) {
    int64_t column = round_down(begin, kWidth);
    const auto edge = [&](Vec x, Vec fill) {
      return keep(x, static_cast<int>(begin - column), static_cast<int>(end - column), fill);
    };
    if (column < begin) {
      f(column, edge);
      column += kWidth;
    }
    for (; column + kWidth <= end; column += kWidth) f(column, [](Vec x, Vec) { return x; });
    if (column < end) f(column, edge);
  }

  static void clear(Element* p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) p[i] = Element{};
  }

  // Adds the packed keys that each of `rows` loaded rows sees to its state (m, l, acc). `fresh`: the state is empty
  // (m = -inf, l = 0, acc not yet written).
  void attend(int64_t rows, float* m, float* l, float* acc, bool fresh) {
    const int64_t end = highs[rows - 1];
    for (int64_t begin = round_down(lows[0], kColumns); begin < end; begin += kBlock) {
      const int64_t block_end = smaller(begin + kBlock, end);
      multiply_keys(rows, begin, block_end);
      for (int64_t row = 0; row < rows; ++row) soften(row, rows, begin, block_end, m, l, acc, fresh);
      for (int64_t panel = 0; panel < columns / kColumns; ++panel) {
        for (int64_t row = 0; row < rows; row += Panels::kGroup) {
          const int64_t group_rows = smaller(rows - row, static_cast<int64_t>(Panels::kGroup));
          int64_t from, to;
          float* sum = acc + row * columns + panel * kColumns;
          if (depth_range(row, row + group_rows - 1, begin, block_end, from, to)) {
            Panels::template multiply<kScoreStride>(probabilities + row * kScoreStride + (from - begin),
                                                    values + panel * value_stride + from * kColumns, to - from, sum,
                                                    columns, group_rows, head_size - panel * kColumns, !fresh);
          } else if (fresh) {
            for (int64_t r = 0; r < group_rows; ++r)
              for (int v = 0; v < kVectors; ++v) store(sum + r * columns + v * kWidth, zero());
          }
        }
      }
      fresh = false;
    }
    if (fresh) {
      for (int64_t i = 0; i < rows * columns; i += kWidth) store(acc + i, zero());
    }
  }

  // Columns [from, to) of a block that the product with V runs over for rows first..last; false where there are none.
  bool depth_range(int64_t first, int64_t last, int64_t begin, int64_t end, int64_t& from, int64_t& to) const {
    const int64_t low = larger(begin, lows[first]), high = smaller(end, highs[last]);
    if (low >= high) return false;
    from = round_down(low, Panels::kPair);
    to = from + round_up(high - from, Panels::kDepthMultiple);
    return true;
  }

  // Scores of one row to probabilities, zero wherever the product of its group reads outside [low, high).
  void soften(int64_t row, int64_t rows, int64_t block_begin, int64_t block_end, float* m, float* l, float* acc,
              bool fresh) {
    const int64_t first = round_down(row, Panels::kGroup);
    int64_t from, to;
    if (!depth_range(first, smaller(first + Panels::kGroup, rows) - 1, block_begin, block_end, from, to)) return;
    const int64_t begin = larger(block_begin, lows[row]) - block_begin;
    const int64_t end = smaller(block_end, highs[row]) - block_begin;
    float* score = scores + row * kScoreStride;
    Element* probability = probabilities + row * kScoreStride;
    if (begin >= end) return clear(probability, from - block_begin, to - block_begin);
    const float block_maximum = row_maximum(score, begin, end);
    const float maximum = larger(m[row], block_maximum);
    const float sum = row_exponentials(score, begin, end, maximum, probability);
    clear(probability, from - block_begin, round_down(begin, kWidth));
    clear(probability, round_up(end, kWidth), to - block_begin);
    const float rescale = m[row] == maximum ? 1.0f : fresh ? 0.0f : __builtin_exp2f(m[row] - maximum);
    l[row] = l[row] * rescale + sum;
    m[row] = maximum;
    if (!fresh && rescale != 1.0f) {
      for (int64_t i = 0; i < columns; i += kWidth)
        store(acc + row * columns + i, mul(set1(rescale), load(acc + row * columns + i)));
    }
  }
};
