#include "cpu/memory.h"

#include <algorithm>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ncfast {

void* allocate_bytes(size_t bytes) {
  constexpr size_t kSmallPage = 1 << 12, kHugePage = 1 << 21;
  const bool huge = bytes >= 2 * kHugePage;
  void* memory = nullptr;
  if (posix_memalign(&memory, huge ? kHugePage : kSmallPage, std::max<size_t>(bytes, 1)))
    throw std::bad_alloc();
#if defined(__linux__)
  if (huge) madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
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
