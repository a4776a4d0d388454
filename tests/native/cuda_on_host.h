// Stands in for the CUDA runtime, so that csrc/cuda/*.cu runs without a device: g++ -x c++ -include cuda_on_host.h
// -DRANKERNEL_CUDA_ON_HOST. Blocks run one after the other. The threads of a block are fibers on one system thread that
// hand over at __syncthreads and at shuffles; every round runs those that are not held by a barrier, in ascending
// order, or in descending order where `cuda_on_host_descending` is set. A result that differs between the two has a
// barrier missing.
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
#define __host__
#define __grid_constant__
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
  __half() = default;
  explicit __half(float rounded) : value(static_cast<_Float16>(rounded)) {}
  operator float() const { return static_cast<float>(value); }
};

struct __nv_bfloat16 {
  uint16_t high;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    high = static_cast<uint16_t>(value != value ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
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
    for (unsigned t = 0; t < threads; ++t) {
      fibers_[t]->state = State::kNew;
      fibers_[t]->shuffles = 0;
    }
    for (unsigned done = 0; done < threads;) {
      unsigned held = 0;
      done = 0;
      for (unsigned n = 0; n < threads; ++n) {
        const unsigned t = cuda_on_host_descending ? threads - 1 - n : n;
        threadIdx.x = t;
        running_ = fibers_[t].get();
        if (running_->state == State::kNew || running_->state == State::kInWarp) resume();
        held += running_->state == State::kAtBarrier;
        done += running_->state == State::kDone;
      }
      if (held == 0 || held + done < threads) continue;
      if (done != 0) fail("threads returned before a __syncthreads of the others");
      for (unsigned t = 0; t < threads; ++t) fibers_[t]->state = State::kInWarp;
    }
  }

  void synchronize() { wait(State::kAtBarrier); }

  // A warp's lanes shuffle in the same rounds. Two sets of slots: a lane that goes on must not overwrite what the lanes
  // after it still have to read.
  float shuffle(float value, unsigned distance) {
    Fiber& mine = *running_;
    const unsigned shuffles = ++mine.shuffles;
    mine.slots[shuffles % 2] = value;
    wait(State::kInWarp);
    const Fiber& other = *fibers_[threadIdx.x ^ distance];
    // Lanes that had their turn in this round may be one further.
    if (other.shuffles - shuffles > 1) fail("a lane is not at the shuffle of the others");
    return other.slots[shuffles % 2];
  }

 private:
  enum class State { kNew, kInWarp, kAtBarrier, kDone };
  struct Fiber {
    static constexpr size_t kStack = 256 << 10;
    std::unique_ptr<char[]> stack{new char[kStack]};
    ucontext_t start;
    jmp_buf here;
    State state;
    unsigned shuffles;
    float slots[2];
  };

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_host: %s\n", what);
    std::abort();
  }

  // ucontext starts a fiber on its own stack; from then on _setjmp and _longjmp switch, without system calls.
  __attribute__((noinline)) void wait(State state) {
    running_->state = state;
    if (_setjmp(running_->here) == 0) _longjmp(scheduler_, 1);
  }

  __attribute__((noinline)) void resume() {
    if (_setjmp(scheduler_) != 0) return;
    if (running_->state != State::kNew) _longjmp(running_->here, 1);
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

inline void __syncthreads() { cuda_on_host::Block::current().synchronize(); }

inline float __shfl_xor_sync(unsigned, float value, unsigned distance) {
  return cuda_on_host::Block::current().shuffle(value, distance);
}

#define RANKERNEL_LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream), cuda_on_host::launch(grid, block, [&] { kernel(__VA_ARGS__); }))
