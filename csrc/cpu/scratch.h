// Uninitialised memory in 64-byte lines, one part per thread. Compiled at baseline.
#pragma once

#include <omp.h>

#include <cstddef>
#include <memory>
#include <new>

namespace rankernel {

class Scratch {
 public:
  // Throws std::bad_alloc. The parts are rounded up to whole lines.
  Scratch(size_t bytes, int threads)
      : bytes_((bytes + kLine - 1) / kLine * kLine),
        memory_(static_cast<char*>(::operator new(bytes_* static_cast<size_t>(threads), std::align_val_t(kLine)))) {}
  char* data() const { return memory_.get(); }
  void* of_thread() const { return memory_.get() + bytes_ * static_cast<size_t>(omp_get_thread_num()); }

 private:
  static constexpr size_t kLine = 64;
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(kLine)); }
  };
  size_t bytes_;
  std::unique_ptr<char, Free> memory_;
};

}  // namespace rankernel
