#include "cpu/memory.h"

#include <algorithm>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ncfast {

namespace {

constexpr size_t kSmallPage = 1 << 12, kHugePage = 1 << 21, kLarge = 2 * kHugePage;

}  // namespace

void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  if (bytes < kLarge) return;
  const auto from = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (from + kHugePage - 1) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), (from + bytes - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

void* allocate_bytes(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, bytes >= kLarge ? kHugePage : kSmallPage, std::max<size_t>(bytes, 1)))
    throw std::bad_alloc();
  prefer_huge_pages(memory, bytes);
  return memory;
}

namespace {

thread_local Memory<char> kept;

}  // namespace

Memory<char> allocate_or_kept(size_t bytes) {
  return kept && kept.get_deleter().bytes >= bytes ? std::move(kept) : allocate<char>(bytes);
}

void keep(Memory<char> memory) {
  constexpr size_t kMost = 16 << 20;
  const size_t bytes = memory.get_deleter().bytes;
  if (bytes <= kMost && (!kept || kept.get_deleter().bytes < bytes)) kept = std::move(memory);
}

}  // namespace ncfast
