// What the kernels of every op share: launching, sums, reductions over a block.
#pragma once

#include <cstdint>

#ifndef RANKERNEL_CUDA_ON_HOST  // tests/native/cuda_on_host.h stands in for all of this
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define RANKERNEL_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace rankernel::cuda {

constexpr unsigned kBlock = 128;  // threads of every block

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Values that are loaded and stored at once: what 16 bytes hold, unless told.
template <class T, int kCount = 16 / sizeof(T)>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
  static constexpr int kSize = kCount;
  T values[kCount];
};

// Kahan's sum: as exact as one rounding however many terms there are, so that long lists need no float64.
class Sum {
 public:
  __device__ void add(float x) {
    const float corrected = x - lost_;
    const float sum = sum_ + corrected;
    lost_ = (sum - sum_) - corrected;
    sum_ = sum;
  }
  __device__ void scale(float factor) {
    sum_ *= factor;
    lost_ *= factor;
  }
  __device__ float value() const { return sum_; }

 private:
  float sum_ = 0, lost_ = 0;
};

// op over the block's values, in the same order every time; all threads call and all get the result.
template <class T, class Op>
__device__ T block_reduce(T value, Op op) {
  __shared__ T values[kBlock];
  __syncthreads();  // until the last result is read
  values[threadIdx.x] = value;
  for (unsigned half = kBlock / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] = op(values[threadIdx.x], values[threadIdx.x + half]);
  }
  __syncthreads();
  return values[0];
}

}  // namespace rankernel::cuda
