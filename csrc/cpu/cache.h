// Cache lines, and asking for them before they are needed.
#pragma once

#include <stdint.h>

namespace vqfast {

constexpr int64_t kCacheLine = 64;

// Every line of `bytes` bytes; most of them, where the first is not at the start of one.
static inline __attribute__((always_inline)) void prefetch(const void *data, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch((const char *)data + byte);
}

}  // namespace vqfast
