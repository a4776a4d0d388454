// Stable order of floats from the highest down, and a bump allocator for the work arrays of a list. Compiled at
// baseline.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "listwise_kernels.h"

namespace rankernel {

// Work memory that is handed out in order and taken back all at once; blocks are kept for the next list.
class Arena {
 public:
  void reset() { block_ = 0, used_ = 0; }

  // Uninitialised, in 64-byte lines, with a line to spare behind the last element. Throws std::bad_alloc.
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 2 * kLine - 1) / kLine * kLine;
    while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].size) ++block_, used_ = 0;
    if (block_ == blocks_.size()) {
      const size_t size = bytes > kBlock ? bytes : kBlock;
      blocks_.push_back({std::unique_ptr<char, Free>(new (std::align_val_t(kLine)) char[size]), size});
    }
    char* const p = blocks_[block_].memory.get() + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(p);
  }

 private:
  static constexpr size_t kLine = 64, kBlock = size_t{1} << 16;  // below the size at which malloc asks the system
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t(kLine)); }
  };
  struct Block {
    std::unique_ptr<char, Free> memory;
    size_t size;
  };
  std::vector<Block> blocks_;
  size_t block_ = 0, used_ = 0;
};

// f(i) for 0 <= i < count. Without a second thread there is no OpenMP region: even one of a single thread costs
// microseconds, several times what a short list does.
template <class Function>
void parallel_for(int num_threads, int64_t count, Function f) {
  if (num_threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) f(i);
}

// order[r] = index of the value of rank r, the lower index first among equal values (-0 equals 0). NaN have a place
// too. The result does not depend on the number of threads.
void order_descending(const float* values, int64_t n, int num_threads, CountRanks count_ranks, Arena& arena,
                      int32_t* order);

}  // namespace rankernel
