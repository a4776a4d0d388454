// Scratch memory handed out in 64-byte lines; counts when `memory` is null.
struct Arena {
  char* memory;
  size_t used;
  template <class E>
  E* take(int64_t count) {
    E* taken = memory ? reinterpret_cast<E*>(memory + used) : nullptr;
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(E)), 64));
    return taken;
  }
};
