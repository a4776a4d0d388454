// Radix sort on the bits of the floats: least significant digit first, digits that all values share are skipped. Labels
// are mostly small integers, whose sort is one pass or two.

#include "ordering.h"

#include <algorithm>
#include <cstring>

namespace rankernel {
namespace {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits, kPasses = 32 / kDigitBits;
constexpr int64_t kShort = 40;              // insertion sort is faster below
constexpr int64_t kPart = int64_t{1} << 16;  // of long lists, per task

struct Keyed {
  uint32_t key;
  int32_t index;
};

// Rising where the value falls.
uint32_t key_of(float value) {
  const float x = value + 0.0f;  // -0 becomes 0
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

void insertion_sort(const float* values, int64_t n, int32_t* order) {
  uint32_t keys[kShort];
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = key_of(values[i]);
    int64_t at = i;
    for (; at > 0 && keys[at - 1] > key; --at) keys[at] = keys[at - 1], order[at] = order[at - 1];
    keys[at] = key;
    order[at] = static_cast<int32_t>(i);
  }
}

}  // namespace

void order_descending(const float* values, int64_t n, int num_threads, Arena& arena, int32_t* order) {
  if (n <= kShort) return insertion_sort(values, n, order);
  const int64_t parts = (n + kPart - 1) / kPart;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), parts));
  Keyed *from = arena.take<Keyed>(n), *to = arena.take<Keyed>(n);
  int64_t* const counts = arena.take<int64_t>(parts * kPasses * kDigits);
  std::fill_n(counts, parts * kPasses * kDigits, int64_t{0});
  const auto counts_of = [&](int64_t part, int pass) { return counts + (part * kPasses + pass) * kDigits; };
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = part * kPart; i < std::min(n, (part + 1) * kPart); ++i) {
      from[i] = {key_of(values[i]), static_cast<int32_t>(i)};
      for (int pass = 0; pass < kPasses; ++pass)
        ++counts_of(part, pass)[(from[i].key >> (pass * kDigitBits)) & (kDigits - 1)];
    }
  }
  bool moved = false;
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = pass * kDigitBits;
    int64_t totals[kDigits] = {}, used = 0;
    for (int64_t part = 0; part < parts; ++part)
      for (int digit = 0; digit < kDigits; ++digit) totals[digit] += counts_of(part, pass)[digit];
    for (const int64_t total : totals) used += total != 0;
    if (used <= 1) continue;
    // Parts hold other values after a pass has moved them.
    if (moved && parts > 1) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
      for (int64_t part = 0; part < parts; ++part) {
        int64_t* const count = counts_of(part, pass);
        std::fill_n(count, kDigits, int64_t{0});
        for (int64_t i = part * kPart; i < std::min(n, (part + 1) * kPart); ++i)
          ++count[(from[i].key >> shift) & (kDigits - 1)];
      }
    }
    int64_t position = 0;
    for (int digit = 0; digit < kDigits; ++digit)
      for (int64_t part = 0; part < parts; ++part) {
        int64_t& count = counts_of(part, pass)[digit];
        const int64_t begin = position;
        position += count;
        count = begin;
      }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t part = 0; part < parts; ++part) {
      int64_t* const next = counts_of(part, pass);
      for (int64_t i = part * kPart; i < std::min(n, (part + 1) * kPart); ++i)
        to[next[(from[i].key >> shift) & (kDigits - 1)]++] = from[i];
    }
    std::swap(from, to);
    moved = true;
  }
  for (int64_t i = 0; i < n; ++i) order[i] = from[i].index;
}

}  // namespace rankernel
