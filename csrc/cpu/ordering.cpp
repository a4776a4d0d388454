// Longer lists: radix sort on the bits of the floats that vary, least significant digit first: labels are mostly small
// integers, which differ in few bits.

#include "ordering.h"

#include <algorithm>
#include <cstring>

namespace rankernel {
namespace {

constexpr int kMaxDigitBits = 8, kMaxDigits = 1 << kMaxDigitBits;
constexpr int64_t kShort = 32;  // insertion sort is fastest up to here, then counting, n^2 comparisons in vectors
constexpr int64_t kCounted = 192;
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

void order_descending(const float* values, int64_t n, int num_threads, CountRanks count_ranks, Arena& arena,
                      int32_t* order) {
  if (n <= kShort) return insertion_sort(values, n, order);
  if (n <= kCounted) {
    uint32_t keys[kCounted + kPadding] = {0};
    int32_t ranks[kCounted];
    for (int64_t i = 0; i < n; ++i) keys[i] = key_of(values[i]);
    count_ranks(keys, n, ranks);
    for (int64_t i = 0; i < n; ++i) order[ranks[i]] = static_cast<int32_t>(i);
    return;
  }
  const int64_t parts = (n + kPart - 1) / kPart;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), parts));
  Keyed *from = arena.take<Keyed>(n), *to = arena.take<Keyed>(n);
  uint32_t* const differences = arena.take<uint32_t>(parts);
  const auto part_end = [&](int64_t part) { return std::min(n, (part + 1) * kPart); };
  const uint32_t some_key = key_of(values[0]);
  parallel_for(threads, parts, [&](int64_t part) {
    uint32_t difference = 0;
    for (int64_t i = part * kPart; i < part_end(part); ++i) {
      from[i] = {key_of(values[i]), static_cast<int32_t>(i)};
      difference |= from[i].key ^ some_key;
    }
    differences[part] = difference;
  });
  uint32_t varying = 0;
  for (int64_t part = 0; part < parts; ++part) varying |= differences[part];
  if (varying != 0) {
    // Digits of equal width over the bits between the first and the last that vary.
    const int lowest = __builtin_ctz(varying), bits = 32 - __builtin_clz(varying) - lowest;
    const int passes = (bits + kMaxDigitBits - 1) / kMaxDigitBits, width = (bits + passes - 1) / passes;
    const int digits = 1 << width;
    int64_t* const counts = arena.take<int64_t>(parts * kMaxDigits);
    for (int pass = 0; pass < passes; ++pass) {
      const int shift = lowest + pass * width;
      const auto digit_of = [=](uint32_t key) { return (key >> shift) & static_cast<uint32_t>(digits - 1); };
      parallel_for(threads, parts, [&](int64_t part) {
        int64_t* const count = counts + part * digits;
        std::fill_n(count, digits, int64_t{0});
        for (int64_t i = part * kPart; i < part_end(part); ++i) ++count[digit_of(from[i].key)];
      });
      int64_t position = 0;
      for (int digit = 0; digit < digits; ++digit)
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t begin = position;
          position += counts[part * digits + digit];
          counts[part * digits + digit] = begin;
        }
      parallel_for(threads, parts, [&](int64_t part) {
        int64_t* const next = counts + part * digits;
        for (int64_t i = part * kPart; i < part_end(part); ++i) to[next[digit_of(from[i].key)]++] = from[i];
      });
      std::swap(from, to);
    }
  }
  for (int64_t i = 0; i < n; ++i) order[i] = from[i].index;
}

}  // namespace rankernel
