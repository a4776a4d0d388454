// Stands in for the CUDA runtime, so that csrc/cuda/*.cu runs without a device: g++ -x c++ -include cuda_on_host.h
// -DRANKERNEL_CUDA_ON_HOST. Blocks run one after the other. The threads of a block are fibers on one system thread that
// hand over at __syncthreads; every round runs them in ascending order, or in descending order where
// `cuda_on_host_descending` is set. A result that differs between the two has a barrier missing.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __shared__ static

struct Index3 {
  unsigned x;
};
inline Index3 threadIdx, blockIdx;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct __half {
  _Float16 value;
  operator float() const { return static_cast<float>(value); }
};

struct __nv_bfloat16 {
  uint16_t high;
  operator float() const {
    const uint32_t bits = uint32_t{high} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

using std::max;
using std::min;

extern "C" {
__attribute__((visibility("default"), used)) inline bool cuda_on_host_descending = false;
}

namespace cuda_on_host {

class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  void run(unsigned threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    for (unsigned t = 0; t < threads; ++t) fibers_[t]->state = State::kNew;
    for (unsigned done = 0; done < threads;) {
      for (unsigned n = 0; n < threads; ++n) {
        const unsigned t = cuda_on_host_descending ? threads - 1 - n : n;
        threadIdx.x = t;
        running_ = fibers_[t].get();
        resume();
        done += running_->state == State::kDone;
      }
      if (done != 0 && done != threads) {
        std::fprintf(stderr, "cuda_on_host: %u of %u threads returned before a __syncthreads of the others\n", done,
                     threads);
        std::abort();
      }
    }
  }

  // ucontext starts a fiber on its own stack; from then on _setjmp and _longjmp switch, without system calls.
  __attribute__((noinline)) void wait() {
    if (_setjmp(running_->here) == 0) _longjmp(scheduler_, 1);
  }

 private:
  enum class State { kNew, kWaiting, kDone };
  struct Fiber {
    static constexpr size_t kStack = 256 << 10;
    std::unique_ptr<char[]> stack{new char[kStack]};
    ucontext_t start;
    jmp_buf here;
    State state;
  };

  __attribute__((noinline)) void resume() {
    if (_setjmp(scheduler_) != 0) return;
    if (running_->state == State::kWaiting) _longjmp(running_->here, 1);
    running_->state = State::kWaiting;
    getcontext(&running_->start);
    running_->start.uc_stack.ss_sp = running_->stack.get();
    running_->start.uc_stack.ss_size = Fiber::kStack;
    running_->start.uc_link = nullptr;
    makecontext(&running_->start, enter, 0);
    setcontext(&running_->start);
  }

  static void enter() {
    Block& block = current();
    (*block.kernel_)();
    block.running_->state = State::kDone;
    _longjmp(block.scheduler_, 1);
  }

  const std::function<void()>* kernel_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* running_;
  jmp_buf scheduler_;
};

inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    Block::current().run(threads, kernel);
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::Block::current().wait(); }

#define RANKERNEL_LAUNCH(kernel, grid, block, stream, ...) \
  cuda_on_host::launch(grid, block, [&] { kernel(__VA_ARGS__); })
