// Matrix products on packed panels: C[rows x kColumns] (+)= A[rows x depth] B[depth x kColumns], B one panel.
//
// A panel holds kColumns columns of B, depth by depth, kPair consecutive depths side by side (one for float32, two for
// bfloat16, whose multiply-add takes pairs): element (k, column) lies at ((k / kPair) * kColumns + column) * kPair
// + k % kPair. A is row-major with a stride known at compile time, which turns all row offsets into displacements.

constexpr int kColumns = kVectors * kWidth;

struct FloatPanels {
  using Element = float;
  using Operand = Vec;
  static constexpr int kPair = 1;           // depths per panel row
  static constexpr int kDepthMultiple = 1;  // depth must be a multiple of this; the rest is zero
  static constexpr int kGroup = kRows;      // rows of one product
  static constexpr int kGroups = 4;         // groups of rows in a tile
  static constexpr int kStoredRows = 1;     // products write whole multiples of so many rows
  static constexpr int kExpDegree = 6;      // exp2 for probabilities that stay float32

  static Operand broadcast(const float* a) { return set1(*a); }
  static Operand load_columns(const float* b) { return load(b); }
  static Vec multiply_add(Operand a, Operand b, Vec c) { return fmadd(a, b, c); }

  // kWidth elements as float32, zero beyond `left`.
  template <class T>
  static Vec load_units(const T* p, int64_t left) {
    return load_partial(p, static_cast<int>(larger(smaller(left, static_cast<int64_t>(kWidth)), int64_t{0})));
  }
  // Elements [element, element + kColumns) of a row of values, or zeros for a null row.
  template <class T>
  static void store_values(float* to, const T* const (&rows)[1], int64_t element, int64_t left) {
    for (int v = 0; v < kVectors; ++v)
      store(to + v * kWidth, rows[0] ? load_units(rows[0] + element + v * kWidth, left - v * kWidth) : zero());
  }
  template <int kStride>
  static void multiply(const float* a, const float* b, int64_t depth, float* c, int64_t c_stride, int64_t rows,
                       int64_t columns, bool accumulate);
};

// One product of exactly R rows and V of the kVectors vectors of a panel, all accumulators in registers. What is there
// is added last: sums over many products are sums of partial sums, whose error grows more slowly.
template <class Panels, int R, int V, int kStride>
inline void multiply_rows(const typename Panels::Element* a, const typename Panels::Element* b, int64_t depth, float* c,
                          int64_t c_stride, bool accumulate) {
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = zero();
  for (int64_t k = 0; k < depth; k += Panels::kPair) {
    typename Panels::Operand columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = Panels::load_columns(b + (k * kVectors + v * Panels::kPair) * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Panels::Operand row = Panels::broadcast(a + r * kStride + k);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = Panels::multiply_add(row, columns[v], sum[r][v]);
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

// 1 <= rows <= R; writes at least `columns` of the panel's columns.
template <class Panels, int R, int kStride>
inline void multiply_up_to(const typename Panels::Element* a, const typename Panels::Element* b, int64_t depth,
                           float* c, int64_t c_stride, int64_t rows, int64_t columns, bool accumulate) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_up_to<Panels, R - 1, kStride>(a, b, depth, c, c_stride, rows, columns, accumulate);
  }
  if (columns <= kWidth) {
    multiply_rows<Panels, R, 1, kStride>(a, b, depth, c, c_stride, accumulate);
  } else {
    multiply_rows<Panels, R, kVectors, kStride>(a, b, depth, c, c_stride, accumulate);
  }
}

template <int kStride>
void FloatPanels::multiply(const float* a, const float* b, int64_t depth, float* c, int64_t c_stride, int64_t rows,
                           int64_t columns, bool accumulate) {
  multiply_up_to<FloatPanels, kGroup, kStride>(a, b, depth, c, c_stride, rows, columns, accumulate);
}
