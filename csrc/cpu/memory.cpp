#include "cpu/memory.h"

#include <algorithm>
#include <new>

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

}  // namespace ncfast
