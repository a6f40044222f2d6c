// Hopper's own instructions, one a function: barriers that count threads and bytes, copies in bulk, products of
// bfloat16 matrices by warpgroups. They need sm_90a. On the host tests/hostsim/hopper_shim.h stands in.
#pragma once

#include "device.cuh"

namespace vqfast {

constexpr int kWarpgroup = 128;  // threads; its first warp's number is a multiple of 4
constexpr int kProductCodes = 128, kProductFeatures = 16;

// A matrix in shared memory: rows of 32, 64 or 128 bytes, eight of them an atom that starts at a multiple of its size.
// The 16-byte chunks of an atom are permuted: bits of the address from 4 on change with those from 7 on, so that eight
// rows of one chunk lie in all banks. `byte` counts from such a start.
__host__ __device__ constexpr int64_t swizzled(int64_t byte, int row_bytes) {
  return byte ^ ((byte >> 7 & (row_bytes / 16 - 1)) << 4);
}

// Names such a matrix: in units of 16 bytes where it starts (bits 0-13) and the step from atom to atom (32-45); in
// 62-63 its permutation. The step along a row (16-29) is not looked at. Sixteen features further is 2 more.
template <int row_bytes>
__device__ __forceinline__ uint64_t describe(uint32_t shared_address) {
  static_assert(row_bytes == 32 || row_bytes == 64 || row_bytes == 128, "what products can read");
  constexpr uint64_t permutation = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return permutation << 62 | (uint64_t)(8 * row_bytes / 16) << 32 | 1ull << 16 | shared_address / 16;
}

// In shared memory. Phases follow each other; one ends when as many threads have arrived as `initialise` said, and as
// many bytes as they expect.
typedef uint64_t Barrier;

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void *shared) {
  return (uint32_t)__cvta_generic_to_shared(shared);
}

__device__ __forceinline__ void initialise(Barrier &barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// By the thread that has initialised, before the block's barrier that tells the others.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier &barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
__device__ __forceinline__ void arrive_and_expect(Barrier &barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended; that before the first has parity 1.
__device__ __forceinline__ void wait(Barrier &barrier, int parity) {
  int ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.s32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// From global to shared memory by the copy engine; all addresses and sizes multiples of 16 bytes.
__device__ __forceinline__ void copy_in_bulk(void *shared, const void *global, int bytes, Barrier &arrival) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(&arrival))
               : "memory");
}

// How many registers each thread of the warpgroup has from here on.
template <int registers>
__device__ __forceinline__ void give_registers_up() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// The 64 sums of a thread as operands.
#define VQFAST_SUMS_8(i)                                                                                        \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define VQFAST_SUMS                                                                                               \
  VQFAST_SUMS_8(0), VQFAST_SUMS_8(8), VQFAST_SUMS_8(16), VQFAST_SUMS_8(24), VQFAST_SUMS_8(32), VQFAST_SUMS_8(40), \
      VQFAST_SUMS_8(48), VQFAST_SUMS_8(56)

// Nothing: but no instruction that reads or writes these sums is moved over it.
__device__ __forceinline__ void hold(float (&sums)[64]) { asm volatile("" : VQFAST_SUMS::"memory"); }

// Before products whose sums were read or written by other instructions.
__device__ __forceinline__ void begin_products(float (&sums)[64]) {
  hold(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void end_product_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most so many groups, the last ones, are under way. Only then do `sums` hold what older ones made, and only
// then is what they read free.
template <int groups>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}
template <int groups>
__device__ __forceinline__ void wait_for_products(float (&sums)[64]) {
  wait_for_products<groups>();
  hold(sums);
}

// Sums of the products of 64 rows a and 128 rows b, 16 features, by a warpgroup; added to `sums` if `onto`. Thread t
// has rows t / 32 * 16 + t % 32 / 4 (sums 4 j, 4 j + 1) and eight further (4 j + 2, 4 j + 3), columns 8 j + 2 (t % 4)
// and the next.
__device__ __forceinline__ void multiply_add(float (&sums)[64], uint64_t a, uint64_t b, bool onto) {
  asm volatile(
      "{\n"
      ".reg .pred onto;\n"
      "setp.ne.b32 onto, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, onto, 1, 1, 0, 0;\n"
      "}"
      : VQFAST_SUMS
      : "l"(a), "l"(b), "r"((int)onto));
}

#undef VQFAST_SUMS_8
#undef VQFAST_SUMS

#else

inline uint32_t shared_address(const void *shared) { return shim::shared_address(shared); }
inline void initialise(Barrier &barrier, int arrivals) { shim::initialise(&barrier, arrivals); }
inline void publish_barriers() { shim::publish_barriers(); }
inline void arrive(Barrier &barrier) { shim::arrive(&barrier, 0); }
inline void arrive_and_expect(Barrier &barrier, int bytes) { shim::arrive(&barrier, bytes); }
inline void wait(Barrier &barrier, int parity) { shim::wait(&barrier, parity); }
inline void copy_in_bulk(void *shared, const void *global, int bytes, Barrier &arrival) {
  shim::copy_in_bulk(shared, global, bytes, &arrival);
}
template <int registers>
void give_registers_up() {}
template <int registers>
void take_registers() {}
inline void hold(float (&)[64]) {}
inline void begin_products(float (&sums)[64]) { shim::begin_products(sums); }
inline void end_product_group() { shim::end_product_group(); }
template <int groups>
void wait_for_products() {
  shim::wait_for_products(groups);
}
template <int groups>
void wait_for_products(float (&)[64]) {
  shim::wait_for_products(groups);
}
inline void multiply_add(float (&sums)[64], uint64_t a, uint64_t b, bool onto) { shim::product(sums, a, b, onto); }

#endif

}  // namespace vqfast
