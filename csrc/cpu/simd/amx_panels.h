// TDPBF16PS: a 16 x 16 float32 tile += 16 x 32 times 32 x 16 bfloat16. A product runs on 2 x 2 accumulator tiles, so
// each loaded tile is used twice.
struct AmxPanels : Bf16Pairs {
  static constexpr int kDepthMultiple = 32;
  static constexpr int kGroup = 32, kGroups = 2, kStoredRows = 32;

  // Accumulators: tiles 0, 1 for the upper 16 rows and 2, 3 for the lower; operands: 4, 5 rows, 6, 7 columns. Without
  // lower rows or without right columns the tiles of that side stay out.
  template <int kStride>
  static void multiply(const BFloat16* a, const BFloat16* b, int64_t depth, float* c, int64_t c_stride, int64_t rows,
                       int64_t columns, bool accumulate) {
    // The tile instructions are opaque to the compiler: what they read must have been written.
    __asm__ volatile("" ::: "memory");
    if (rows > 16) {
      columns > 16 ? product<kStride, true, true>(a, b, depth, c, c_stride, accumulate)
                   : product<kStride, true, false>(a, b, depth, c, c_stride, accumulate);
    } else {
      columns > 16 ? product<kStride, false, true>(a, b, depth, c, c_stride, accumulate)
                   : product<kStride, false, false>(a, b, depth, c, c_stride, accumulate);
    }
    __asm__ volatile("" ::: "memory");
  }

  template <int kStride, bool kLower, bool kRight>
  static void product(const BFloat16* a, const BFloat16* b, int64_t depth, float* c, int64_t c_stride,
                      bool accumulate) {
    RK_TILES;
    float* const lower = c + 16 * c_stride;
    if (accumulate) {
      RK_TILE_LOAD_C(0, c, c_stride);
      if (kRight) RK_TILE_LOAD_C(1, c + 16, c_stride);
      if (kLower) RK_TILE_LOAD_C(2, lower, c_stride);
      if (kLower && kRight) RK_TILE_LOAD_C(3, lower + 16, c_stride);
    } else {
      RK_TILE_ZERO(0);
      if (kRight) RK_TILE_ZERO(1);
      if (kLower) RK_TILE_ZERO(2);
      if (kLower && kRight) RK_TILE_ZERO(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
      RK_TILE_LOAD(4, a + k, kStride);
      RK_TILE_LOAD(6, b + k * kColumns, 64);
      RK_TILE_MULTIPLY(0, 4, 6);
      if (kRight) RK_TILE_LOAD(7, b + k * kColumns + 32, 64);
      if (kRight) RK_TILE_MULTIPLY(1, 4, 7);
      if (kLower) RK_TILE_LOAD(5, a + 16 * kStride + k, kStride);
      if (kLower) RK_TILE_MULTIPLY(2, 5, 6);
      if (kLower && kRight) RK_TILE_MULTIPLY(3, 5, 7);
    }
    RK_TILE_STORE_C(0, c, c_stride);
    if (kRight) RK_TILE_STORE_C(1, c + 16, c_stride);
    if (kLower) RK_TILE_STORE_C(2, lower, c_stride);
    if (kLower && kRight) RK_TILE_STORE_C(3, lower + 16, c_stride);
  }
};
