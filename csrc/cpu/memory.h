// Memory that a call needs while it runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace ncfast {

struct Free {
  size_t bytes = 0;
  void operator()(void* memory) const { std::free(memory); }
};

template <class T>
using Memory = std::unique_ptr<T, Free>;

// Before the first touch of large memory, asks the system for huge pages: there are more small ones than the
// processor keeps translations of, and the first touch of each is a fault.
void prefer_huge_pages(void* memory, size_t bytes);

// Aligned to a page, large ones on huge pages.
void* allocate_bytes(size_t bytes);

template <class T>
Memory<T> allocate(int64_t count) {
  const size_t bytes = count * sizeof(T);
  return Memory<T>(static_cast<T*>(allocate_bytes(bytes)), Free{bytes});
}

// For what a small call asks for: kept for the thread's next one, as fresh pages take longer than the
// products of 128 rows.
Memory<char> allocate_or_kept(size_t bytes);
void keep(Memory<char> memory);

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace ncfast
