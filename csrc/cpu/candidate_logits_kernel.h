// candidate_logits for one instruction set: dot products of rows that lie contiguous in memory on both sides. A
// register tile holds one vector of sums for each pair of rows, filled in the order of the columns and added up by the
// same tree in every shape of tile: a logit does not depend on what else is computed.

constexpr int kTileWeights = 4;
constexpr int kTileHidden = kWidth == 16 ? 4 : kWidth == 8 ? 2 : 1;
constexpr int kSums = kWidth == 1 ? 8 : 1;  // vectors per pair: eight short sums round less than one long one

// Elements that loads of scattered rows are prefetched ahead, and rows where they follow each other.
constexpr int64_t kPrefetchElements = 512, kPrefetchRows = 4;

struct FloatDot {
  using Operand = Vec;
  static constexpr int64_t kStep = kWidth;
  template <class E>
  static Vec load_whole(const E* p) {
    return load(p);
  }
  template <class E>
  static Vec load_up_to(const E* p, int64_t left) {
    return load_partial(p, static_cast<int>(left));
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fmadd(a, b, c); }
};

// At most kWeightBlock weight rows; the last is repeated to fill a tile.
template <class T>
struct WeightBlock {
  const T* rows[kWeightBlock];
  float bias[kWeightBlock];
  int64_t count;

  // id(i): the vocabulary entry of row i.
  template <class Id>
  WeightBlock(const CandidateLogitsArgs& args, int64_t count, Id id) : count(count) {
    for (int64_t i = 0; i < round_up(count, kTileWeights); ++i) {
      const int64_t entry = id(smaller(i, count - 1));
      rows[i] = static_cast<const T*>(args.weight) + entry * args.weight_stride;
      bias[i] = args.bias ? to_float(static_cast<const T*>(args.bias)[entry]) : 0.0f;
    }
  }
};

// Logits of a block of weight rows, one row for each hidden row. Uninitialised: tiles fill it.
struct alignas(64) LogitBlock {
  float rows[kHiddenBlock][kWeightBlock];
};

// Products of kHidden x kTileWeights rows, the first at z, hidden rows kWeightBlock apart.
template <class Dot, int kHidden, class H, class T>
inline void multiply_tile(const H* const* hidden, const T* const* weights, int64_t size, int64_t ahead, float* z) {
  Vec sums[kHidden][kTileWeights][kSums];
#pragma GCC unroll 4
  for (int b = 0; b < kHidden; ++b)
#pragma GCC unroll 4
    for (int j = 0; j < kTileWeights; ++j)
#pragma GCC unroll 8
      for (int s = 0; s < kSums; ++s) sums[b][j][s] = zero();
  const auto step = [&](int64_t k, auto operand) {
    typename Dot::Operand weight[kTileWeights][kSums];
#pragma GCC unroll 4
    for (int j = 0; j < kTileWeights; ++j)
#pragma GCC unroll 8
      for (int s = 0; s < kSums; ++s) weight[j][s] = operand(weights[j], k + s * Dot::kStep);
#pragma GCC unroll 4
    for (int b = 0; b < kHidden; ++b)
#pragma GCC unroll 8
      for (int s = 0; s < kSums; ++s) {
        const typename Dot::Operand h = operand(hidden[b], k + s * Dot::kStep);
#pragma GCC unroll 4
        for (int j = 0; j < kTileWeights; ++j) sums[b][j][s] = Dot::multiply_add(h, weight[j][s], sums[b][j][s]);
      }
  };
  constexpr int64_t kStep = Dot::kStep * kSums;
  int64_t k = 0;
  for (; k + kStep <= size; k += kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileWeights; ++j) __builtin_prefetch(weights[j] + k + ahead, 0, 2);
    step(k, [](const auto* row, int64_t at) { return Dot::load_whole(row + at); });
  }
  if (k < size) step(k, [size](const auto* row, int64_t at) { return Dot::load_up_to(row + at, size - at); });
  if constexpr (kHidden * kTileWeights == kWidth) {
    Vec tile[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) tile[i] = sums[i % kHidden][i / kHidden][0];
    alignas(64) float lanes[kWidth];
    store(lanes, reduce_add(tile));
    for (int b = 0; b < kHidden; ++b)
      __builtin_memcpy(z + b * kWeightBlock, lanes + b * kTileWeights, kTileWeights * sizeof(float));
  } else {
#pragma GCC unroll 4
    for (int b = 0; b < kHidden; ++b)
#pragma GCC unroll 4
      for (int j = 0; j < kTileWeights; ++j) {
#pragma GCC unroll 3
        for (int half = kSums / 2; half > 0; half /= 2)
#pragma GCC unroll 4
          for (int s = 0; s < half; ++s) sums[b][j][s] = add(sums[b][j][s], sums[b][j][s + half]);
        z[b * kWeightBlock + j] = reduce_add(sums[b][j][0]);
      }
  }
}

// Four weight rows stay in L1 while the hidden rows pass.
template <class Dot, class H, class T>
void multiply_block(const H* hidden, int64_t hidden_stride, int64_t rows, const WeightBlock<T>& block, int64_t size,
                    int64_t ahead, LogitBlock& z) {
  for (int64_t j = 0; j < block.count; j += kTileWeights) {
    for (int64_t b = 0; b < rows; b += kTileHidden) {
      const H* of_tile[kTileHidden];
      for (int64_t i = 0; i < kTileHidden; ++i) of_tile[i] = hidden + smaller(b + i, rows - 1) * hidden_stride;
      if (rows - b == 1)
        multiply_tile<Dot, 1>(of_tile, block.rows + j, size, ahead, &z.rows[b][j]);
      else
        multiply_tile<Dot, kTileHidden>(of_tile, block.rows + j, size, ahead, &z.rows[b][j]);
    }
  }
}

// out = softcap * tanh(scale * (z + bias) / softcap)
inline void finish(const CandidateLogitsArgs& args, const float* z, const float* bias, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const int left = static_cast<int>(count - i);
    Vec x = mul(set1(args.scale), add(load_partial(z + i, left), load_partial(bias + i, left)));
    if (args.softcap > 0) x = mul(set1(args.softcap), tanh(div(x, set1(args.softcap))));
    store_partial(out + i, x, left);
  }
}

template <class Dot, class T>
void score(const CandidateLogitsArgs& args, int64_t row, int64_t rows, int64_t begin, int64_t count) {
  LogitBlock z;
  const int64_t together = args.candidates_stride == 0 ? rows : 1;
  for (int64_t b = row; b < row + rows; b += together) {
    const int64_t* const ids = args.candidates + b * args.candidates_stride + begin;
    const WeightBlock<T> block(args, count, [ids](int64_t i) { return ids[i]; });
    multiply_block<Dot>(static_cast<const T*>(args.hidden) + b * args.hidden_stride, args.hidden_stride, together,
                        block, args.hidden_size, kPrefetchElements, z);
    for (int64_t i = 0; i < together; ++i)
      finish(args, z.rows[i], block.bias, count, args.out + (b + i) * args.num_candidates + begin);
  }
}

// The products of `reduce` as dot products, with the hidden states widened to H beforehand if that is not T.
template <class Dot, class H, class T>
struct DotProducts {
  static constexpr bool kWidened = sizeof(H) != sizeof(T);

  static size_t prepared_bytes(const CandidateLogitsArgs& args) {
    return kWidened ? static_cast<size_t>(args.num_rows * args.hidden_size) * sizeof(H) : 0;
  }
  static void prepare(const CandidateLogitsArgs& args, void* prepared) {
    if constexpr (kWidened) {
      for (int64_t b = 0; b < args.num_rows; ++b) {
        const T* const from = static_cast<const T*>(args.hidden) + b * args.hidden_stride;
        H* const to = static_cast<H*>(prepared) + b * args.hidden_size;
        for (int64_t k = 0; k < args.hidden_size; k += kWidth) {
          const int left = static_cast<int>(smaller(args.hidden_size - k, int64_t{kWidth}));
          store_partial(to + k, load_partial(from + k, left), left);
        }
      }
    }
  }
  static void multiply(const CandidateLogitsArgs& args, const void* prepared, int64_t row, int64_t rows,
                       const WeightBlock<T>& block, LogitBlock& z) {
    const int64_t stride = kWidened ? args.hidden_size : args.hidden_stride;
    const H* const hidden = static_cast<const H*>(kWidened ? prepared : args.hidden);
    multiply_block<Dot>(hidden + row * stride, stride, rows, block, args.hidden_size,
                        kPrefetchRows * args.weight_stride, z);
  }
};

// Adds kWeightBlock logits, whose padding is -inf. A NaN among them makes the sum NaN, though not the maximum.
inline void accumulate(const float* z, PartialSum& total) {
  Vec highest = load(z);
  for (int64_t i = kWidth; i < kWeightBlock; i += kWidth) highest = max(highest, load(z + i));
  const float maximum = reduce_max(highest);
  if (maximum > total.maximum) {
    total.sum *= __builtin_expf(total.maximum - maximum);
    total.maximum = maximum;
  }
  Vec sum = zero();
  for (int64_t i = 0; i < kWeightBlock; i += kWidth)
    sum = add(sum, exp2<6>(mul(set1(kLog2E), sub(load(z + i), set1(total.maximum)))));
  total.sum += reduce_add(sum);
}

template <class Products, class T>
void reduce(const CandidateLogitsArgs& args, const void* prepared, int64_t begin, int64_t end, PartialSum* sums) {
  LogitBlock z;
  // Finite, so that logits of -inf alone leave a sum of 0.
  for (int64_t b = 0; b < args.num_rows; ++b) sums[b] = {-3e38f, 0.0f};
  for (; begin < end; begin += kWeightBlock) {
    const int64_t count = smaller(end - begin, kWeightBlock);
    const WeightBlock<T> block(args, count, [begin](int64_t i) { return begin + i; });
    for (int64_t row = 0; row < args.num_rows; row += kHiddenBlock) {
      const int64_t rows = smaller(args.num_rows - row, kHiddenBlock);
      Products::multiply(args, prepared, row, rows, block, z);
      for (int64_t b = 0; b < rows; ++b) {
        finish(args, z.rows[b], block.bias, count, z.rows[b]);
        for (int64_t i = count; i < kWeightBlock; ++i) z.rows[b][i] = kNegativeInfinity;
        accumulate(z.rows[b], sums[row + b]);
      }
    }
  }
}

template <class Dot, class H, class T>
CandidateKernels kernels_of() {
  using Products = DotProducts<Dot, H, T>;
  return {score<Dot, T>, Products::prepared_bytes, Products::prepare, reduce<Products, T>};
}
