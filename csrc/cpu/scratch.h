// Uninitialised memory in 64-byte lines, one part per thread. Compiled at baseline.
#pragma once

#include <omp.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace rankernel {

// Large fresh buffers cost one page fault per 4 KiB on first touch, 15 % of a call at 10,000 tokens; with huge pages
// the kernel clears 2 MiB at a time.
inline void advise_huge_pages(void* data, size_t bytes) {
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

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
