// A few rows, with one adapter or one each, are bound by latency and by reading the factors. A warp takes a tile of
// 4 ranks and 256 columns of a factor, 8 columns a lane, and multiplies it with up to 4 rows that share it. The warps
// of a block divide among them what is summed over (columns for sums, rows for gradients, ranks for out) and add up in
// shared memory: no atomics, and a row's results do not depend on the other rows. Large batches need tensor cores and
// are better served by the Triton kernels.

#include "lora_linear.h"

#include <climits>

#include "block_ops.cuh"

namespace rankernel::cuda {
namespace {

constexpr unsigned kWarps = kBlock / 32;
constexpr int kRanks = 4;
constexpr int kColumns = 8;  // of a lane
constexpr int64_t kTile = 32 * kColumns;
constexpr int64_t kFactors = 48;

// Factors [first, first + count) of a call.
template <class Args>
struct Launch {
  Args args;
  const int64_t* seed;
  int64_t first, count;
  LoraFactor factors[kFactors];
};
static_assert(sizeof(Launch<LoraShrinkArgs>) + 16 <= 4096, "what a kernel's parameters may take");

template <class T, int kSize>
__host__ __device__ bool are_vectors(const void* data, int64_t stride, int64_t size) {
  constexpr int64_t kBytes = alignof(Vector<T, kSize>);
  return reinterpret_cast<uintptr_t>(data) % kBytes == 0 && stride * sizeof(T) % kBytes == 0 && size % kSize == 0;
}

// Columns of a lane in a warp's tile: 8 in a row to load at once, or 16 lanes beside one another, which suits every
// alignment and shares one Philox counter.
template <bool kVector>
__device__ int64_t column_of(int j) {
  const int64_t lane = threadIdx.x % 32;
  return kVector ? kColumns * lane + j : 128 * (lane / 16) + lane % 16 + 16 * j;
}

// The lane's columns of a row, zeros from `size` on. For vectors the stride is 1.
template <bool kVector, class T>
__device__ void load(const T* row, int64_t stride, int64_t begin, int64_t size, float (&values)[kColumns]) {
  if constexpr (kVector) {
    Vector<T, kColumns> vector{};
    const int64_t column = begin + column_of<true>(0);
    if (column < size) vector = *reinterpret_cast<const Vector<T, kColumns>*>(row + column);
    for (int j = 0; j < kColumns; ++j) values[j] = static_cast<float>(vector.values[j]);
  } else {
    for (int j = 0; j < kColumns; ++j) {
      const int64_t column = begin + column_of<false>(j);
      values[j] = column < size ? static_cast<float>(row[column * stride]) : 0;
    }
  }
}

// The lane's columns of kRanks ranks, zeros from factor.rank on.
template <bool kVector, class T>
__device__ void load(const LoraFactor& factor, int64_t rank, int64_t begin, int64_t size,
                     float (&tile)[kRanks][kColumns]) {
  const T* data = static_cast<const T*>(factor.data);
  // B transposed: the ranks of a column are contiguous.
  if (!kVector && factor.rank_stride == 1 && are_vectors<T, kRanks>(data, factor.size_stride, factor.rank)) {
    for (int j = 0; j < kColumns; ++j) {
      const int64_t column = begin + column_of<false>(j);
      Vector<T, kRanks> ranks{};
      if (column < size) ranks = *reinterpret_cast<const Vector<T, kRanks>*>(data + column * factor.size_stride + rank);
      for (int i = 0; i < kRanks; ++i) tile[i][j] = static_cast<float>(ranks.values[i]);
    }
    return;
  }
  for (int i = 0; i < kRanks; ++i)
    load<kVector>(data + (rank + i) * factor.rank_stride, factor.size_stride, begin, rank + i < factor.rank ? size : 0,
                  tile[i]);
}

// Which of the lane's columns dropout keeps, by the Philox4x32-10 of python/rankernel/reference/lora_linear.py.
__device__ unsigned kept(const LoraDropout& dropout, const int64_t* seed, int64_t row, int64_t begin) {
  if (dropout.threshold == 0) return ~0u;
  const auto key = static_cast<uint64_t>(*seed);
  auto key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  uint32_t words[] = {static_cast<uint32_t>(begin / kColumns) + threadIdx.x % 32, static_cast<uint32_t>(row),
                      static_cast<uint32_t>(row >> 32), 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{words[0]} * 0xD2511F53u, b = uint64_t{words[2]} * 0xCD9E8D57u;
    words[0] = static_cast<uint32_t>(b >> 32) ^ words[1] ^ key0;
    words[1] = static_cast<uint32_t>(b);
    words[2] = static_cast<uint32_t>(a >> 32) ^ words[3] ^ key1;
    words[3] = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  unsigned columns = 0;
  for (int j = 0; j < kColumns; ++j) columns |= ((words[j / 2] >> 16 * (j % 2) & 0xFFFF) >= dropout.threshold) << j;
  return columns;
}

// What elements that are kept are multiplied with.
__device__ float gain(const LoraDropout& dropout) { return 65536.0f / static_cast<float>(65536 - dropout.threshold); }

template <bool kVector, class T>
__device__ void load_dropped(const Launch<LoraShrinkArgs>& launch, int64_t row, int64_t begin,
                             float (&values)[kColumns]) {
  const LoraShrinkArgs& args = launch.args;
  load<kVector>(static_cast<const T*>(args.x) + row * args.x_stride, 1, begin, args.size, values);
  if constexpr (!kVector) {
    const unsigned columns = kept(args.dropout, launch.seed, row, begin);
    for (int j = 0; j < kColumns; ++j) values[j] = columns >> j & 1 ? values[j] : 0;
  }
}

// Rows [begin, end) that use factors [first, last) of this launch.
struct Run {
  int64_t begin, end, first, last;
};

template <class Args>
__device__ Run run_of(int64_t row, const Launch<Args>& launch) {
  const LoraSegments& segments = launch.args.segments;
  Run run{0, launch.args.num_rows, 0, 0};
  if (segments.offsets == nullptr) {
    run.last = launch.count;
  } else if (segments.count > 0) {
    int64_t low = 0, high = segments.count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (segments.offsets[middle] <= row ? low : high) = middle;
    }
    run.begin = max(int64_t{0}, min(segments.offsets[low], row));
    run.end = max(row + 1, min(segments.offsets[low + 1], launch.args.num_rows));
    const int64_t adapter = segments.adapters[low];
    if (adapter >= launch.first && adapter - launch.first < launch.count) {
      run.first = adapter - launch.first;
      run.last = run.first + 1;
    }
  }
  return run;
}

struct Place {
  int64_t factor, rank;
};

// Where the group of kRanks ranks with this number is in factors [factor, last); in `last` if they have fewer.
template <class Args>
__device__ Place place_of(int64_t group, const Launch<Args>& launch, int64_t factor, int64_t last) {
  for (; factor < last; ++factor) {
    const int64_t groups = divide_up(launch.factors[factor].rank, kRanks);
    if (group < groups) break;
    group -= groups;
  }
  return {factor, group * kRanks};
}

// Warp n < kCount gets, lane by lane, the sums of values[n] over the warps. Once in a kernel.
template <int kCount, int kSize>
__device__ void add_warps(const float (&values)[kCount][kSize], float (&sums)[kSize]) {
  __shared__ float all[kCount][kSize][kBlock];
  for (int n = 0; n < kCount; ++n)
    for (int i = 0; i < kSize; ++i) all[n][i][threadIdx.x] = values[n][i];
  __syncthreads();
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= kCount) return;
  for (int i = 0; i < kSize; ++i) {
    sums[i] = 0;
    for (unsigned w = 0; w < kWarps; ++w) sums[i] += all[warp][i][32 * w + lane];
  }
}

// A block for kRanks ranks of up to kRows rows of a run. There is one for every row; those of rows between do nothing.
template <class X, class F, int kRows, bool kVector>
__global__ void shrink_sums(const __grid_constant__ Launch<LoraShrinkArgs> launch, unsigned groups) {
  const LoraShrinkArgs& args = launch.args;
  const int64_t row = blockIdx.x / groups, group = blockIdx.x % groups;
  const Run run = run_of(row, launch);
  if ((row - run.begin) % kRows != 0) return;
  const int64_t end = min(row + kRows, run.end);

  // Later launches write over what is not theirs.
  if (group == 0 && launch.first == 0) {
    for (int64_t column = threadIdx.x; column < args.width; column += kBlock) {
      bool is_used = false;
      for (int64_t f = run.first; f < run.last; ++f)
        is_used |= column >= launch.factors[f].column && column < launch.factors[f].column + launch.factors[f].rank;
      for (int64_t r = row; r < end && !is_used; ++r) args.sums[r * args.sums_stride + column] = 0;
    }
  }
  const Place place = place_of(group, launch, run.first, run.last);
  if (place.factor == run.last) return;

  const LoraFactor& factor = launch.factors[place.factor];
  float sums[kRows][kRanks] = {};
  // One row leaves registers to load several steps at once.
  constexpr int kSteps = kVector && kRows == 1 ? 4 : 1;
  constexpr int64_t kStep = kWarps * kTile;
  for (int64_t first = threadIdx.x / 32 * kTile; first < args.size; first += kSteps * kStep) {
    float tiles[kSteps][kRanks][kColumns];
    for (int step = 0; step < kSteps; ++step)
      load<kVector, F>(factor, place.rank, first + step * kStep, args.size, tiles[step]);
    for (int n = 0; n < kRows; ++n) {
      for (int step = 0; step < kSteps; ++step) {
        float x[kColumns];
        load_dropped<kVector, X>(launch, min(row + n, end - 1), first + step * kStep, x);
        for (int i = 0; i < kRanks; ++i)
          for (int j = 0; j < kColumns; ++j) sums[n][i] += tiles[step][i][j] * x[j];
      }
    }
  }
  float totals[kRanks];
  add_warps(sums, totals);
  const int64_t mine = row + threadIdx.x / 32;
  if (threadIdx.x / 32 >= kRows || mine >= end) return;
  for (int i = 0; i < kRanks; ++i) {
    for (unsigned distance = 16; distance > 0; distance /= 2) totals[i] += __shfl_xor_sync(~0u, totals[i], distance);
    if (threadIdx.x % 32 == 0 && place.rank + i < factor.rank)
      args.sums[mine * args.sums_stride + factor.column + place.rank + i] =
          factor.scale * gain(args.dropout) * totals[i];
  }
}

// A block for kRanks ranks and kTile columns of a gradient.
template <class X, class F>
__global__ void shrink_gradients(const __grid_constant__ Launch<LoraShrinkArgs> launch, unsigned tiles) {
  const LoraShrinkArgs& args = launch.args;
  const int64_t begin = int64_t{blockIdx.x % tiles} * kTile, warp = threadIdx.x / 32;
  const Place place = place_of(blockIdx.x / tiles, launch, 0, launch.count);
  const LoraFactor& factor = launch.factors[place.factor];
  if (factor.gradient == nullptr) return;

  float sums[kRanks][kColumns] = {};
  const auto add_rows = [&](int64_t first, int64_t last) {
    for (int64_t row = first + warp; row < last; row += kWarps) {
      float x[kColumns];
      load_dropped<false, X>(launch, row, begin, x);
      const float* coefficients = args.coefficients + row * args.coefficients_stride + factor.column;
      for (int i = 0; i < kRanks; ++i) {
        const float coefficient = coefficients[min(place.rank + i, factor.rank - 1)];
        for (int j = 0; j < kColumns; ++j) sums[i][j] += coefficient * x[j];
      }
    }
  };
  const LoraSegments& segments = args.segments;
  if (segments.offsets == nullptr) add_rows(0, args.num_rows);
  for (int64_t s = 0; segments.offsets && s < segments.count; ++s)
    if (segments.adapters[s] == launch.first + place.factor)
      add_rows(max(int64_t{0}, min(segments.offsets[s], args.num_rows)), min(segments.offsets[s + 1], args.num_rows));

  static_assert(kWarps == kRanks, "a warp writes a rank");
  float totals[kColumns];
  add_warps(sums, totals);
  const int64_t rank = place.rank + warp;
  for (int j = 0; j < kColumns; ++j) {
    const int64_t column = begin + column_of<false>(j);
    if (rank < factor.rank && column < args.size)
      static_cast<F*>(factor.gradient)[rank * factor.gradient_rank_stride + column * factor.gradient_size_stride] =
          static_cast<F>(factor.scale * gain(args.dropout) * totals[j]);
  }
}

// A block for kTile columns of up to kRows rows of a run, as in shrink_sums.
template <class X, class F, int kRows>
__global__ void expand(const __grid_constant__ Launch<LoraExpandArgs> launch, unsigned tiles) {
  const LoraExpandArgs& args = launch.args;
  const int64_t row = blockIdx.x / tiles, begin = int64_t{blockIdx.x % tiles} * kTile, warp = threadIdx.x / 32;
  const Run run = run_of(row, launch);
  if ((row - run.begin) % kRows != 0 || run.first == run.last) return;
  const int64_t end = min(row + kRows, run.end), mine = row + warp;

  X* out = static_cast<X*>(args.out) + min(mine, end - 1) * args.out_stride;
  float values[kColumns];  // loaded before the warps wait for one another
  load<false>(out, 1, begin, args.size, values);
  float sums[kRows][kColumns] = {};
  for (int64_t f = run.first; f < run.last; ++f) {
    const LoraFactor& factor = launch.factors[f];
    for (int64_t rank = warp * kRanks; rank < factor.rank; rank += kWarps * kRanks) {
      float tile[kRanks][kColumns];
      load<false, F>(factor, rank, begin, args.size, tile);
      for (int n = 0; n < kRows; ++n) {
        const int64_t own = min(row + n, end - 1) * args.coefficients_stride + factor.column + rank;
        for (int i = 0; i < kRanks; ++i) {
          const float coefficient = rank + i < factor.rank ? factor.scale * args.coefficients[own + i] : 0;
          for (int j = 0; j < kColumns; ++j) sums[n][j] += coefficient * tile[i][j];
        }
      }
    }
  }
  float totals[kColumns];
  add_warps(sums, totals);
  if (warp >= kRows || mine >= end) return;
  const unsigned columns = kept(args.dropout, launch.seed, mine, begin);
  for (int j = 0; j < kColumns; ++j) {
    const int64_t column = begin + column_of<false>(j);
    if (column < args.size && (columns >> j & 1))
      out[column] = static_cast<X>(values[j] + gain(args.dropout) * totals[j]);
  }
}

// Calls go(launch, of_row, all) for kFactors factors at a time, and once where there are none. Groups of kRanks ranks:
// that a row has at most, and that all factors have.
template <class Args, class Function>
int in_launches(const Args& args, const int64_t* seed, Function go) {
  Launch<Args> launch{args, seed, 0, 0, {}};
  do {
    launch.count = min(kFactors, args.num_factors - launch.first);
    int64_t most = 0, all = 0;
    for (int64_t f = 0; f < launch.count; ++f) {
      launch.factors[f] = args.factors[launch.first + f];
      const int64_t groups = divide_up(launch.factors[f].rank, kRanks);
      most = max(most, groups);
      all += groups;
    }
    if (const int error = go(launch, args.segments.offsets ? most : all, all)) return error;
    launch.first += kFactors;
  } while (launch.first < args.num_factors);
  return cudaSuccess;
}

template <class Kernel, class Args>
int run(Kernel kernel, int64_t count, int64_t parts, const Launch<Args>& launch, void* stream) {
  if (count == 0 || parts == 0) return cudaSuccess;
  if (count > INT_MAX / parts) return cudaErrorInvalidValue;
  RANKERNEL_LAUNCH(kernel, static_cast<unsigned>(count * parts), kBlock, static_cast<cudaStream_t>(stream), launch,
                   static_cast<unsigned>(parts));
  return cudaGetLastError();
}

// Whether several rows have the same factor, so that they share its tiles.
template <class Args>
bool has_runs(const Args& args) {
  return args.num_rows > (args.segments.offsets ? args.segments.count : 1);
}

template <class X, class F>
int launch_shrink(const LoraShrinkArgs& args, const int64_t* seed, void* stream) {
  bool vectors = args.dropout.threshold == 0 && are_vectors<X, kColumns>(args.x, args.x_stride, args.size);
  bool learns = false;  // of no rows, coefficients have no address either
  for (int64_t f = 0; f < args.num_factors; ++f) {
    const LoraFactor& factor = args.factors[f];
    vectors &= factor.size_stride == 1 && are_vectors<F, kColumns>(factor.data, factor.rank_stride, args.size);
    learns |= factor.gradient && (args.coefficients || args.num_rows == 0);
  }
  const auto sums = has_runs(args) ? (vectors ? shrink_sums<X, F, 4, true> : shrink_sums<X, F, 4, false>)
                                   : (vectors ? shrink_sums<X, F, 1, true> : shrink_sums<X, F, 1, false>);
  return in_launches(args, seed, [&](const Launch<LoraShrinkArgs>& launch, int64_t of_row, int64_t all) {
    int error = cudaSuccess;
    if (args.sums) error = run(sums, args.num_rows, max(of_row, int64_t{1}), launch, stream);
    if (error == cudaSuccess && learns)
      error = run(shrink_gradients<X, F>, all, divide_up(args.size, kTile), launch, stream);
    return error;
  });
}

template <class X, class F>
int launch_expand(const LoraExpandArgs& args, const int64_t* seed, void* stream) {
  const auto kernel = has_runs(args) ? expand<X, F, 4> : expand<X, F, 1>;
  return in_launches(args, seed, [&](const Launch<LoraExpandArgs>& launch, int64_t, int64_t) {
    return run(kernel, args.num_rows, divide_up(args.size, kTile), launch, stream);
  });
}

}  // namespace

int lora_shrink(const LoraShrinkArgs& args, const int64_t* seed, void* stream) {
  const bool wide = args.factor_dtype == DType::kFloat32;
  if (args.dtype == DType::kFloat32) return launch_shrink<float, float>(args, seed, stream);
  if (args.dtype == DType::kBFloat16)
    return (wide ? launch_shrink<__nv_bfloat16, float> : launch_shrink<__nv_bfloat16, __nv_bfloat16>)(args, seed,
                                                                                                      stream);
  return (wide ? launch_shrink<__half, float> : launch_shrink<__half, __half>)(args, seed, stream);
}

int lora_expand(const LoraExpandArgs& args, const int64_t* seed, void* stream) {
  const bool wide = args.factor_dtype == DType::kFloat32;
  if (args.dtype == DType::kFloat32) return launch_expand<float, float>(args, seed, stream);
  if (args.dtype == DType::kBFloat16)
    return (wide ? launch_expand<__nv_bfloat16, float> : launch_expand<__nv_bfloat16, __nv_bfloat16>)(args, seed,
                                                                                                      stream);
  return (wide ? launch_expand<__half, float> : launch_expand<__half, __half>)(args, seed, stream);
}

}  // namespace rankernel::cuda
