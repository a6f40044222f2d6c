// Products of bfloat16 matrices on tensor cores and the copies that feed them, an instruction each, from sm_80 on. The
// tests' twins are at the end.
#pragma once

#include "device.cuh"

namespace vqfast {

// A tile in shared memory: rows of 64 features, 128 bytes, in chunks of 16 bytes. The chunks of a row are permuted by
// its number, so that neither a copy nor load_matrices has two threads at one bank.
constexpr int kTileRowBytes = 128, kChunkFeatures = 8;

__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kTileRowBytes + (chunk ^ (row & 7)) * 16;
}

#ifdef __CUDACC__

// 16 bytes from global to shared memory, in the background: there once a wait has let its group pass.
__device__ __forceinline__ void copy_chunk(void *shared, const void *global) {
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most so many groups, the last ones, are on their way.
template <int n>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// A value that other threads may be raising meanwhile.
__device__ __forceinline__ int relaxed_load(const int &value) {
  return *reinterpret_cast<const volatile int *>(&value);
}

// Four matrices of 8 x 8 bfloat16; lane 8 i + j names row j of matrix i. Lane l gets elements 2 (l % 4) and the next of
// row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&parts)[4], const void *row) {
  const uint32_t from = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(from)
               : "memory");
}

// sums += a b^T: 16 rows a against 8 rows b, 16 features. Lane l holds rows l / 4 (sums 0, 1) and l / 4 + 8 (2, 3),
// columns 2 (l % 4) and the next.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

// Twins. A copy is there at once, which a device may do too.
inline void copy_chunk(void *shared, const void *global) { __builtin_memcpy(shared, global, 16); }
inline void end_copy_group() {}
template <int n>
void wait_for_copies() {}
inline int relaxed_load(const int &value) { return __atomic_load_n(&value, __ATOMIC_RELAXED); }

inline void load_matrices(uint32_t (&parts)[4], const void *row) {
  const uint64_t *rows = shim::exchange((uint64_t)row);
  const char *from[4];
  for (int i = 0; i < 4; ++i) from[i] = (const char *)rows[8 * i + shim::lane() / 4] + shim::lane() % 4 * 4;
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&parts[i], from[i], 4);
}

// Any order of the sum and any rounding of it that keeps the bound would do.
inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned lane = shim::lane();
  float row[2][16], column[2][16];
  const auto take = [&](uint32_t part, const int (&owners)[2], int first, float (&low)[16], float (&high)[16]) {
    // `part` holds two features of the owner's row; four neighbouring lanes hold eight.
    const uint64_t *all = shim::exchange(part);
    for (int q = 0; q < 4; ++q)
      for (int e = 0; e < 2; ++e) {
        low[first + 2 * q + e] = __uint_as_float((uint32_t)(all[owners[0] * 4 + q] >> 16 * e & 0xffff) << 16);
        high[first + 2 * q + e] = __uint_as_float((uint32_t)(all[owners[1] * 4 + q] >> 16 * e & 0xffff) << 16);
      }
  };
  const int g = (int)lane / 4, t = (int)lane % 4;
  float unused[16];
  take(a[0], {g, g}, 0, row[0], unused);
  take(a[1], {g, g}, 0, row[1], unused);
  take(a[2], {g, g}, 8, row[0], unused);
  take(a[3], {g, g}, 8, row[1], unused);
  take(b0, {2 * t, 2 * t + 1}, 0, column[0], column[1]);
  take(b1, {2 * t, 2 * t + 1}, 8, column[0], column[1]);
  for (int r = 0; r < 2; ++r)
    for (int c = 0; c < 2; ++c)
      for (int k = 0; k < 16; ++k) sums[2 * r + c] += row[r][k] * column[c][k];
}

#endif

}  // namespace vqfast
