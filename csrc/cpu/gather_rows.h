// Vectors whose features lie apart, copied to where they lie side by side.
#pragma once

#include "cache.h"
#include "score_engine.h"
#include "simd_elements.h"

namespace vqfast::VQFAST_ISA {

typedef vu vu_unaligned __attribute__((aligned(4), may_alias));

static inline __attribute__((always_inline)) vu load_bits(const uint32_t *p) { return *(const vu_unaligned *)p; }
static inline __attribute__((always_inline)) vu load_bits(const uint16_t *p) {
  return __builtin_convertvector(*(const vs_unaligned *)p, vu);
}
static inline __attribute__((always_inline)) void store_bits(uint32_t *p, vu v) { *(vu_unaligned *)p = v; }
static inline __attribute__((always_inline)) void store_bits(uint16_t *p, vu v) {
  *(vs_unaligned *)p = __builtin_convertvector(v, vs);
}

// kLanes vectors of kLanes elements. Numbered through, an element's number has the bits of its vector above those of
// its place; to deal the upper and the lower half of all vectors in turn turns the bits by one.
static inline __attribute__((always_inline)) void transpose(vu (&square)[kLanes]) {
  vi low, high;
  for (int l = 0; l < kLanes; ++l) low[l] = l / 2 + l % 2 * kLanes, high[l] = low[l] + kLanes / 2;
#pragma GCC unroll 4
  for (int turn = 1; turn < kLanes; turn *= 2) {
    vu dealt[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      dealt[2 * i] = __builtin_shuffle(square[i], square[i + kLanes / 2], low);
      dealt[2 * i + 1] = __builtin_shuffle(square[i], square[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = dealt[i];
  }
}

// Vectors first..end-1, which lie within kLanes elements of `from`; whether they are all that lie there, in their
// order.
template <class Bits>
struct Neighbours {
  const Bits *from;
  int64_t first, end;
  bool all;
};

// kLanes features of them, `at` elements further on.
template <class Bits>
static inline __attribute__((always_inline)) void gather_square(const Neighbours<Bits> &group,
                                                                const void *const *vectors, int64_t at,
                                                                int64_t stride_feature, Bits *to, int64_t pitch) {
  const Bits *from = group.from + at;
  // No hardware foresees a stride of a page. Into the second-level cache: in the first, such lines share one set.
  for (int f = 0; f < kLanes; ++f) __builtin_prefetch(from + (kLanes + f) * stride_feature, 0, 2);
  vu square[kLanes];
#pragma GCC unroll 16
  for (int f = 0; f < kLanes; ++f) square[f] = load_bits(from + f * stride_feature);
  transpose(square);
  if (group.all) {
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) store_bits(to + (group.first + l) * pitch, square[l]);
  } else {
    for (int64_t i = group.first; i < group.end; ++i)
      store_bits(to + i * pitch, square[(const Bits *)vectors[i] - group.from]);
  }
}

template <class Bits>
static void gather_as(const void **vectors, int64_t n, int64_t D, int64_t stride_feature, Bits *to, int64_t pitch) {
  constexpr int64_t kFewest = 3;  // neighbours that are worth a square
  const Bits *lowest = (const Bits *)vectors[0], *highest = lowest;
  for (int64_t i = 1; i < n; ++i) {
    const Bits *at = (const Bits *)vectors[i];
    lowest = at < lowest ? at : lowest;
    highest = at > highest ? at : highest;
  }
  Neighbours<Bits> groups[kMostTogether];
  int64_t alone[kMostTogether], n_groups = 0, n_alone = 0;
  for (int64_t i = 0; i < n;) {
    // Nothing outside what the vectors themselves span is read.
    const Bits *at = (const Bits *)vectors[i], *from = highest - at < kLanes ? highest - (kLanes - 1) : at;
    int64_t end = i;
    bool in_order = true;
    for (; end < n && (const Bits *)vectors[end] >= from && (const Bits *)vectors[end] - from < kLanes; ++end)
      in_order &= (const Bits *)vectors[end] - from == end - i;
    if (sizeof(Bits) > 4 || from < lowest || end - i < kFewest) {
      alone[n_alone++] = i++;
    } else {
      groups[n_groups++] = {from, i, end, in_order && end - i == kLanes};
      i = end;
    }
  }
  // A few features at a time of all vectors: neighbours have theirs in one page of memory, often in one cache line.
  for (int64_t d = 0; d < D; d += kLanes) {
    const bool whole = d + kLanes <= D;
    if constexpr (sizeof(Bits) <= 4)
      for (int64_t g = 0; g < n_groups && whole; ++g)
        gather_square(groups[g], vectors, d * stride_feature, stride_feature, to + d, pitch);
    const auto one_by_one = [&](int64_t i) {
      for (int64_t f = d; f < d + kLanes && f < D; ++f)
        to[i * pitch + f] = ((const Bits *)vectors[i])[f * stride_feature];
    };
    for (int64_t j = 0; j < n_alone; ++j) one_by_one(alone[j]);
    for (int64_t g = 0; g < n_groups && !whole; ++g)
      for (int64_t i = groups[g].first; i < groups[g].end; ++i) one_by_one(i);
  }
  for (int64_t i = 0; i < n; ++i) vectors[i] = to + i * pitch;
}

// Moves vectors[0..n-1], n <= kMostTogether, to `to` and points them there, `pitch` elements of `size` bytes apart.
static void gather(int64_t size, const void **vectors, int64_t n, int64_t D, int64_t stride_feature, void *to,
                   int64_t pitch) {
  if (size == 8)
    gather_as(vectors, n, D, stride_feature, (uint64_t *)to, pitch);
  else if (size == 4)
    gather_as(vectors, n, D, stride_feature, (uint32_t *)to, pitch);
  else
    gather_as(vectors, n, D, stride_feature, (uint16_t *)to, pitch);
}

}  // namespace vqfast::VQFAST_ISA
