// Pages of memory that a kernel is the first to write.
#pragma once

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace vqfast {

constexpr int64_t kLargeResult = 4 << 20;  // bytes: more than the second-level caches have

// The pages of a large fresh tensor are mapped one by one as they are first written, which takes longer than many a
// kernel: with pages of 2 MB there are 512 times fewer. A hint, for systems that give them on request only (Linux's
// "madvise").
inline void prefer_large_pages([[maybe_unused]] void *data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  if (bytes <= kLargeResult) return;
  const uintptr_t page = sysconf(_SC_PAGESIZE), begin = ((uintptr_t)data + page - 1) / page * page;
  const uintptr_t end = ((uintptr_t)data + bytes) / page * page;
  if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace vqfast
