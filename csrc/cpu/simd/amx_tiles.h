// The eight AMX tile registers of 16 rows x 64 bytes, in hardware or, with RANKERNEL_AMX_SOFTWARE, in memory: the same
// products bit for bit except that the order of additions inside one instruction may differ.

#ifdef RANKERNEL_AMX_SOFTWARE

struct TileFile {
  alignas(64) float c[4][16][16];
  alignas(64) BFloat16 ab[4][16][32];
};

#define RK_TILES TileFile tiles
#define RK_TILES_BEGIN()
#define RK_TILES_END()
#define RK_TILE_ZERO(t) __builtin_memset(tiles.c[t], 0, sizeof tiles.c[t])
#define RK_TILE_LOAD_C(t, p, stride) \
  for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(tiles.c[t][i], (p) + i * (stride), 64)
#define RK_TILE_STORE_C(t, p, stride) \
  for (int64_t i = 0; i < 16; ++i) __builtin_memcpy((p) + i * (stride), tiles.c[t][i], 64)
#define RK_TILE_LOAD(t, p, stride) \
  for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(tiles.ab[(t) - 4][i], (p) + i * (stride), 64)
#define RK_TILE_MULTIPLY(t, a, b) tile_multiply(tiles.c[t], tiles.ab[(a) - 4], tiles.ab[(b) - 4])

// TDPBF16PS treats denormals as zero and rounds every multiply-add to nearest even.
inline float flushed(BFloat16 x) { return (x.bits & 0x7f80u) ? to_float(x) : 0.0f; }
inline void tile_multiply(float (&c)[16][16], const BFloat16 (&a)[16][32], const BFloat16 (&b)[16][32]) {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int pair = 0; pair < 2; ++pair) {
        const float left = flushed(a[m][2 * k + pair]);
        for (int n = 0; n < 16; ++n) c[m][n] += left * flushed(b[k][2 * n + pair]);
      }
}

#else

struct TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

inline void configure_tiles() {
  alignas(64) TileConfiguration configuration = {};
  configuration.palette = 1;
  for (int t = 0; t < 8; ++t) {
    configuration.row_bytes[t] = 64;
    configuration.rows[t] = 16;
  }
  _tile_loadconfig(&configuration);
}

#define RK_TILES
#define RK_TILES_BEGIN() configure_tiles()
#define RK_TILES_END() _tile_release()
#define RK_TILE_ZERO(t) _tile_zero(t)
#define RK_TILE_LOAD_C(t, p, stride) _tile_loadd(t, p, (stride) * 4)
#define RK_TILE_STORE_C(t, p, stride) _tile_stored(t, p, (stride) * 4)
#define RK_TILE_LOAD(t, p, stride) _tile_loadd(t, p, (stride) * 2)
#define RK_TILE_MULTIPLY(t, a, b) _tile_dpbf16ps(t, a, b)

#endif
