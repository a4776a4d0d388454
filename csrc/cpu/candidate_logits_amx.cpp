#include <immintrin.h>

#include "candidate_kernels.h"

// The log-sum-exp on tiles, whatever the number of rows: 16 weight rows read in place times 16 hidden rows packed in
// pairs. Candidates lie apart, and their logits are the dot products of AVX512_BF16. Compiled once for the hardware
// and, for tests elsewhere, once with software tiles.
#ifdef RANKERNEL_AMX_SOFTWARE
namespace rankernel::amx_emulated {
#else
namespace rankernel::amx {
#endif
namespace {
#include "simd/avx512.h"
#include "simd/math.h"
#include "simd/panels.h"
#include "simd/bf16_pairs.h"
#include "simd/amx_tiles.h"
#include "candidate_logits_kernel.h"

constexpr int64_t kTileRows = 16, kTileDepth = 32, kTileSize = kTileRows * kTileDepth;

struct TileProducts {
  static size_t prepared_bytes(const CandidateLogitsArgs& args) {
    const int64_t elements = round_up(args.num_rows, kTileRows) * round_up(args.hidden_size, kTileDepth);
    return static_cast<size_t>(elements) * sizeof(BFloat16);
  }

  // Groups of 16 hidden rows; tile by tile, element (k, row) of a tile at (k / 2 * 16 + row) * 2 + k % 2.
  static void prepare(const CandidateLogitsArgs& args, void* prepared) {
    float* to = static_cast<float*>(prepared);
    for (int64_t row = 0; row < args.num_rows; row += kTileRows) {
      const BFloat16* const first = static_cast<const BFloat16*>(args.hidden) + row * args.hidden_stride;
      for (int64_t k = 0; k < args.hidden_size; k += kTileDepth) {
        Vec pairs[kWidth];
        for (int64_t i = 0; i < kTileRows; ++i)
          pairs[i] = row + i < args.num_rows
                         ? Bf16Pairs::load_units(first + i * args.hidden_stride + k, args.hidden_size - k)
                         : zero();
        transpose(pairs);
        for (int64_t i = 0; i < kTileRows; ++i, to += kWidth) store(to, pairs[i]);
      }
    }
  }

  struct Operand {
    const BFloat16* data;
    int64_t stride;
  };

  // Rows [j, j + 16) of a block at column k; what lies outside the weight is zero, in a copy.
  static Operand weights(const CandidateLogitsArgs& args, const WeightBlock<BFloat16>& block, int64_t j, int64_t k,
                         BFloat16* copy) {
    if (j + kTileRows <= block.count && k + kTileDepth <= args.hidden_size)
      return {block.rows[j] + k, args.weight_stride};
    for (int64_t i = 0; i < kTileRows; ++i)
      store(reinterpret_cast<float*>(copy + i * kTileDepth),
            j + i < block.count ? Bf16Pairs::load_units(block.rows[j + i] + k, args.hidden_size - k) : zero());
    __asm__ volatile("" ::: "memory");  // the tile instructions are opaque to the compiler
    return {copy, kTileDepth};
  }

  static void multiply(const CandidateLogitsArgs& args, const void* prepared, int64_t row, int64_t rows,
                       const WeightBlock<BFloat16>& block, LogitBlock& z) {
    const int64_t depth = round_up(args.hidden_size, kTileDepth);
    const BFloat16* const hidden = static_cast<const BFloat16*>(prepared) + row * depth;
    for (int64_t j = 0; j < block.count; j += 2 * kTileRows)
      rows > kTileRows ? product<true>(args, hidden, depth, block, j, z)
                       : product<false>(args, hidden, depth, block, j, z);
  }

  // Accumulators: tiles 0, 1 for weight rows [j, j + 16) and 2, 3 for the next 16; operands: 4, 5 weight rows, 6, 7
  // hidden rows. Without right hidden rows the tiles of that side stay out.
  template <bool kRight>
  static void product(const CandidateLogitsArgs& args, const BFloat16* hidden, int64_t depth,
                      const WeightBlock<BFloat16>& block, int64_t j, LogitBlock& z) {
    RK_TILES;
    alignas(64) BFloat16 copies[2][kTileSize];
    alignas(64) float products[4][kTileRows * kWidth];
    RK_TILE_ZERO(0);
    if (kRight) RK_TILE_ZERO(1);
    RK_TILE_ZERO(2);
    if (kRight) RK_TILE_ZERO(3);
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      for (int64_t i = 0; i < 2 * kTileRows; ++i)
        __builtin_prefetch(block.rows[j] + (2 * kTileRows + i) * args.weight_stride + k, 0, 2);
      const Operand upper = weights(args, block, j, k, copies[0]);
      const Operand lower = weights(args, block, j + kTileRows, k, copies[1]);
      const BFloat16* const left = hidden + k * kTileRows;
      RK_TILE_LOAD(4, upper.data, upper.stride);
      RK_TILE_LOAD(6, left, 32);
      RK_TILE_MULTIPLY(0, 4, 6);
      if (kRight) RK_TILE_LOAD(7, left + depth * kTileRows, 32);
      if (kRight) RK_TILE_MULTIPLY(1, 4, 7);
      RK_TILE_LOAD(5, lower.data, lower.stride);
      RK_TILE_MULTIPLY(2, 5, 6);
      if (kRight) RK_TILE_MULTIPLY(3, 5, 7);
    }
    RK_TILE_STORE_C(0, products[0], kWidth);
    if (kRight) RK_TILE_STORE_C(1, products[1], kWidth);
    RK_TILE_STORE_C(2, products[2], kWidth);
    if (kRight) RK_TILE_STORE_C(3, products[3], kWidth);
    __asm__ volatile("" ::: "memory");
    for (int64_t lower = 0; lower < 2; ++lower)
      for (int64_t right = 0; right < (kRight ? 2 : 1); ++right) {
        Vec columns[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) columns[i] = load(products[2 * lower + right] + i * kWidth);
        transpose(columns);
        for (int64_t i = 0; i < kWidth; ++i) store(z.rows[right * kTileRows + i] + j + lower * kTileRows, columns[i]);
      }
  }
};

// The tile configuration belongs to the thread: it lasts for one task.
void reduce_on_tiles(const CandidateLogitsArgs& args, const void* prepared, int64_t begin, int64_t end,
                     PartialSum* sums) {
  RK_TILES_BEGIN();
  reduce<TileProducts, BFloat16>(args, prepared, begin, end, sums);
  RK_TILES_END();
}
}  // namespace

CandidateKernels candidate_kernels(DType dtype) {
  CandidateKernels kernels = avx512bf16::candidate_kernels(dtype);
  kernels.prepared_bytes = TileProducts::prepared_bytes;
  kernels.prepare = TileProducts::prepare;
  kernels.reduce = reduce_on_tiles;
  return kernels;
}

}  // namespace
