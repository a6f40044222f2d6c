// A small search by Hopper's instructions, without a search: 64 rows times tiles of 128 codes that come through a ring
// of two stages. Right, or with one fault planted, for the tests of the simulator itself.
#include "planted_products.h"

#include "hopper.cuh"

namespace {

using namespace vqfast;

enum Fault {
  none,
  no_wait_for_the_copy,
  no_wait_for_room,
  room_before_the_products_are_made,
  sums_before_the_products_are_made,
  no_fence,
  another_permutation,
  another_step,
  more_bytes_expected,
  barriers_not_published,
  another_parity,
};

template <int row_bytes>
void products(const unsigned char *rows, const unsigned char *codes, int tiles, int fault, float *out) {
  constexpr int kStage = kProductCodes * row_bytes;
  VQFAST_DYNAMIC_SHARED(dynamic);
  VQFAST_SHARED(Barrier, filled, [3]);
  VQFAST_SHARED(Barrier, emptied, [2]);
  const int thread = (int)threadIdx.x, lane = thread % 32;
  unsigned char *const tile_rows = dynamic + (0 - shared_address(dynamic)) % 1024, *const ring =
                                                                                       tile_rows + 64 * row_bytes;
  if (thread == 0) {
    for (int s = 0; s < 3; ++s) initialise(filled[s], 1);
    for (int s = 0; s < 2; ++s) initialise(emptied[s], 4);
    if (fault != barriers_not_published) publish_barriers();
  }
  __syncthreads();
  if (thread >= kWarpgroup) {
    if (thread > kWarpgroup) return;
    arrive_and_expect(filled[2], 64 * row_bytes);
    copy_in_bulk(tile_rows, rows, 64 * row_bytes, filled[2]);
    for (int t = 0; t < tiles; ++t) {
      if (fault != no_wait_for_room) wait(emptied[t % 2], t / 2 % 2 ^ 1);
      arrive_and_expect(filled[t % 2], kStage + (fault == more_bytes_expected ? 16 : 0));
      copy_in_bulk(ring + t % 2 * kStage, codes + t * kStage, kStage, filled[t % 2]);
    }
    return;
  }
  wait(filled[2], 0);
  for (int t = 0; t < tiles; ++t) {
    if (fault != no_wait_for_the_copy) wait(filled[t % 2], t / 2 % 2 ^ (fault == another_parity));
    uint64_t a = describe<row_bytes>(shared_address(tile_rows));
    const uint64_t b = describe<row_bytes>(shared_address(ring) + t % 2 * kStage);
    if (fault == another_permutation) a ^= 1ull << 62;
    if (fault == another_step) a += 1ull << 32;
    float sums[64], early[64];
    for (float &sum : sums) sum = 0;
    if (fault != no_fence) begin_products(sums);
    for (int k = 0; k < row_bytes / 32; ++k) multiply_add(sums, a + 2 * k, b + 2 * k, k > 0);
    end_product_group();
    if (fault == room_before_the_products_are_made && lane == 0) arrive(emptied[t % 2]);
    memcpy(early, sums, sizeof early);
    wait_for_products<0>(sums);
    if (fault != room_before_the_products_are_made && lane == 0) arrive(emptied[t % 2]);
    for (int i = 0; i < 64; ++i) {
      const int row = thread / 32 * 16 + i / 2 % 2 * 8 + lane / 4, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      out[(row * tiles + t) * kProductCodes + column] = fault == sums_before_the_products_are_made ? early[i] : sums[i];
    }
  }
}

}  // namespace

int planted_products(int row_bytes, int tiles, int fault, const void *rows, const void *codes, float *out) {
  const auto kernel = row_bytes == 32 ? products<32> : row_bytes == 64 ? products<64> : products<128>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kWarpgroup + 32);
  config.dynamicSmemBytes = 1024 + (64 + 2 * kProductCodes) * row_bytes;
  return cudaLaunchKernelEx(&config, kernel, static_cast<const unsigned char *>(rows),
                            static_cast<const unsigned char *>(codes), tiles, fault, out);
}
