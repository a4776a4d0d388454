// Small batches are bound by reading W. A warp multiplies a few entries of W with up to 8 rows of hidden at once, in 16
// bytes a lane, so that up to 8 rows W is read once; further rows are further blocks, which find it in the L2 cache.
// Up to there FMAs keep up with memory; large batches need tensor cores and are better served by the Triton kernels.
// Every sum has a fixed order that knows neither the batch nor the device: no atomics, and a row's results do not
// depend on the other rows.

#include "candidate_logits.h"

#include <cfloat>
#include <climits>
#include <cmath>

#include "block_ops.cuh"

namespace rankernel::cuda {
namespace {

using Args = CandidateLogitsArgs;

constexpr unsigned kWarps = kBlock / 32;
constexpr int kEntries = 4;  // of W that a warp takes at once for the log-sum-exp
constexpr int kSplit = 64;   // entries of a block: many short blocks keep any number of multiprocessors busy

// A sum of exp: sum * exp(peak). NaN stays in the sum.
struct ExpSum {
  float peak, sum;
  __device__ void add(float z) {
    if (z > peak) {
      sum *= expf(peak - z);
      peak = z;
    }
    sum += expf(z - peak);
  }
};

constexpr ExpSum kEmpty{-FLT_MAX, 0};  // finite, so that -inf may follow

// values[begin ...], zeros from `size` on.
template <class T, bool kAligned>
__device__ Vector<T> load(const T* values, int64_t begin, int64_t size) {
  if constexpr (kAligned) return *reinterpret_cast<const Vector<T>*>(values + begin);
  Vector<T> vector{};
  for (int i = 0; i < Vector<T>::kSize; ++i)
    if (begin + i < size) vector.values[i] = values[begin + i];
  return vector;
}

// Sums of kCount values over the warp; lane l gets number l / (32 / kCount). Exchanging half of what is left at every
// step takes kCount - 1 + log2(32 / kCount) shuffles in place of 5 kCount.
template <int kCount>
__device__ float warp_sums(const float (&values)[kCount], unsigned distance = 16) {
  if constexpr (kCount == 1) {
    float sum = values[0];
    for (; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    return sum;
  } else {
    const bool is_upper = (threadIdx.x & distance) != 0;
    float sums[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) {
      const float low = values[i], high = values[i + kCount / 2];
      sums[i] = (is_upper ? high : low) + __shfl_xor_sync(~0u, is_upper ? low : high, distance);
    }
    return warp_sums(sums, distance / 2);
  }
}

// Which logit of kCount a lane gets, and whether it is the first lane that does.
template <int kCount>
struct Place {
  static constexpr int kLanes = 32 / kCount;
  int number = threadIdx.x % 32 / kLanes;
  bool is_first = threadIdx.x % kLanes == 0;
};

// Logits of kCount entries of W from `entry` on and kRows rows of hidden from `row` on: of Place<kCount * kRows>,
// number / kRows and number % kRows. Beyond the last entry or row they are those of the last. All lanes of a warp call
// it.
template <class T, bool kAligned, int kCount, int kRows>
__device__ float logit(const Args& args, int64_t entry, int64_t row) {
  const T *weights[kCount], *rows[kRows];
  for (int n = 0; n < kCount; ++n)
    weights[n] = static_cast<const T*>(args.weight) + min(entry + n, args.vocabulary - 1) * args.weight_stride;
  for (int r = 0; r < kRows; ++r)
    rows[r] = static_cast<const T*>(args.hidden) + min(row + r, args.num_rows - 1) * args.hidden_stride;

  float sums[kCount * kRows] = {};
  constexpr int kSize = Vector<T>::kSize;
  for (int64_t k = threadIdx.x % 32 * kSize; k < args.hidden_size; k += 32 * kSize) {
    Vector<T> w[kCount];
    for (int n = 0; n < kCount; ++n) w[n] = load<T, kAligned>(weights[n], k, args.hidden_size);
    for (int r = 0; r < kRows; ++r) {
      const Vector<T> h = load<T, kAligned>(rows[r], k, args.hidden_size);
      for (int n = 0; n < kCount; ++n)
        for (int i = 0; i < kSize; ++i)
          sums[n * kRows + r] += static_cast<float>(w[n].values[i]) * static_cast<float>(h.values[i]);
    }
  }
  float z = warp_sums(sums);
  entry = min(entry + Place<kCount * kRows>().number / kRows, args.vocabulary - 1);
  if (args.bias) z += static_cast<float>(static_cast<const T*>(args.bias)[entry]);
  z *= args.scale;
  return args.softcap > 0 ? args.softcap * tanhf(z / args.softcap) : z;
}

// A warp for a candidate and kRows rows, which share it.
template <class T, bool kAligned, int kRows>
__global__ void candidates(Args args) {
  const int64_t task = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t row = task / args.num_candidates * kRows, column = task % args.num_candidates;
  if (row >= args.num_rows) return;
  const int64_t entry = args.candidates[row * args.candidates_stride + column];
  float z = NAN;
  if (entry >= 0 && entry < args.vocabulary) z = logit<T, kAligned, 1, kRows>(args, entry, row);
  const Place<kRows> place;
  const int64_t mine = row + place.number;
  if (place.is_first && mine < args.num_rows) args.out[mine * args.num_candidates + column] = z;
}

// A block for kSplit entries and kRows rows: parts[row, split].
template <class T, bool kAligned, int kRows>
__global__ void exp_sums(Args args, int64_t groups, int64_t splits, ExpSum* parts) {
  const int64_t row = blockIdx.x % groups * kRows, split = blockIdx.x / groups;
  const int64_t end = min((split + 1) * kSplit, args.vocabulary);
  const int number = Place<kEntries * kRows>().number;
  ExpSum mine = kEmpty;
  for (int64_t entry = split * kSplit + threadIdx.x / 32 * kEntries; entry < end; entry += kWarps * kEntries) {
    const float z = logit<T, kAligned, kEntries, kRows>(args, entry, row);
    if (entry + number / kRows < end) mine.add(z);
  }

  __shared__ ExpSum all[kEntries * kWarps][kRows];
  if (Place<kEntries * kRows>().is_first) all[threadIdx.x / 32 * kEntries + number / kRows][number % kRows] = mine;
  __syncthreads();
  if (threadIdx.x >= kRows || row + threadIdx.x >= args.num_rows) return;
  ExpSum total = kEmpty;
  for (const auto& rows : all) total.peak = fmaxf(total.peak, rows[threadIdx.x].peak);
  for (const auto& rows : all) total.sum += rows[threadIdx.x].sum * expf(rows[threadIdx.x].peak - total.peak);
  parts[(row + threadIdx.x) * splits + split] = total;
}

// A block for a row.
__global__ void normalize(Args args, int64_t splits, const ExpSum* parts) {
  parts += blockIdx.x * splits;
  ExpSum total = kEmpty;
  for (int64_t i = threadIdx.x; i < splits; i += kBlock) total.peak = fmaxf(total.peak, parts[i].peak);
  total.peak = block_reduce(total.peak, [](float a, float b) { return fmaxf(a, b); });
  for (int64_t i = threadIdx.x; i < splits; i += kBlock) total.sum += parts[i].sum * expf(parts[i].peak - total.peak);
  const float log_sum = logf(block_reduce(total.sum, [](float a, float b) { return a + b; }));
  if (threadIdx.x == 0) args.lse[blockIdx.x] = total.peak + log_sum;
  float* out = args.out + blockIdx.x * args.num_candidates;
  for (int64_t i = threadIdx.x; i < args.num_candidates; i += kBlock) out[i] = (out[i] - total.peak) - log_sum;
}

// Rows of a warp in the kernels of launch()'s tables. The first takes rows of any alignment.
constexpr int64_t kRowsOf[] = {1, 1, 2, 4, 8};
int kernel_for(int64_t rows, bool is_aligned) {
  return !is_aligned ? 0 : rows > 4 ? 4 : rows > 2 ? 3 : rows > 1 ? 2 : 1;
}

template <class T>
bool is_aligned(const void* data, int64_t stride, int64_t size) {
  constexpr int kSize = Vector<T>::kSize;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kSize == 0 && size % kSize == 0;
}

template <class T>
int launch(const Args& args, ExpSum* parts, cudaStream_t stream) {
  void (*const candidates_of[])(Args) = {candidates<T, false, 1>, candidates<T, true, 1>, candidates<T, true, 2>,
                                         candidates<T, true, 4>, candidates<T, true, 8>};
  void (*const exp_sums_of[])(Args, int64_t, int64_t, ExpSum*) = {
      exp_sums<T, false, 1>, exp_sums<T, true, 1>, exp_sums<T, true, 2>, exp_sums<T, true, 4>, exp_sums<T, true, 8>};
  const bool aligned = is_aligned<T>(args.hidden, args.hidden_stride, args.hidden_size) &&
                       is_aligned<T>(args.weight, args.weight_stride, args.hidden_size);
  const int one = kernel_for(args.candidates_stride == 0 ? args.num_rows : 1, aligned);
  const int all = kernel_for(args.num_rows, aligned);
  const int64_t tasks = divide_up(args.num_rows, kRowsOf[one]) * args.num_candidates;
  const int64_t groups = divide_up(args.num_rows, kRowsOf[all]), splits = divide_up(args.vocabulary, kSplit);
  const auto go = [=](auto kernel, int64_t blocks, auto... arguments) {
    if (blocks > 0) RANKERNEL_LAUNCH(kernel, static_cast<unsigned>(blocks), kBlock, stream, args, arguments...);
  };
  if (tasks > INT_MAX || (args.lse && groups * splits > INT_MAX)) return cudaErrorInvalidValue;
  go(candidates_of[one], divide_up(tasks, kWarps));
  if (args.lse) {
    go(exp_sums_of[all], groups * splits, groups, splits, parts);
    go(normalize, args.num_rows, splits, parts);
  }
  return cudaGetLastError();
}

}  // namespace

size_t candidate_logits_workspace(int64_t num_rows, int64_t vocabulary, bool log_probs) {
  return log_probs ? static_cast<size_t>(num_rows * divide_up(vocabulary, kSplit)) * sizeof(ExpSum) : 0;
}

int candidate_logits(const CandidateLogitsArgs& args, void* workspace, void* stream) {
  auto* parts = static_cast<ExpSum*>(workspace);
  const auto on = static_cast<cudaStream_t>(stream);
  if (args.dtype == DType::kFloat32) return launch<float>(args, parts, on);
  if (args.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(args, parts, on);
  return launch<__half>(args, parts, on);
}

}  // namespace rankernel::cuda
