// Memory of kernels, aligned to cache lines.
#pragma once

#include <stdint.h>

#include <cstdlib>
#include <memory>

#include "cache.h"

namespace vqfast {

struct Free {
  void operator()(void *p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// `bytes` rounded up to whole cache lines.
constexpr int64_t cache_lines(int64_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

// n elements, not initialised; null if there is no memory.
template <class T>
Buffer<T> buffer(int64_t n) {
  const size_t bytes = cache_lines((n > 0 ? n : 1) * (int64_t)sizeof(T));
  return Buffer<T>(static_cast<T *>(std::aligned_alloc(kCacheLine, bytes)));
}

}  // namespace vqfast
