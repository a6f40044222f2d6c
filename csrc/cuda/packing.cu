#include "packing.cuh"

#include "runtime.h"

namespace vqfast {
namespace {

struct alignas(16) Bytes16 {
  uint64_t low, high;
};

// Calls body(T *) with a null pointer of a type that large; false for another size.
template <typename Body>
bool with_bytes(int64_t bytes, Body body) {
  switch (bytes) {
    case 2:
      body((uint16_t *)nullptr);
      return true;
    case 4:
      body((uint32_t *)nullptr);
      return true;
    case 8:
      body((uint64_t *)nullptr);
      return true;
    case 16:
      body((Bytes16 *)nullptr);
      return true;
  }
  return false;
}

// Rows of 16-byte elements in place of smaller ones, where every row of `view` and of `other` starts at a multiple.
void widen_elements(int64_t &bytes, vqfast_rows &view, int64_t &D, const void *other) {
  const int64_t together = 16 / bytes;
  if (view.stride_feature != 1 || D % together || view.stride_row % together || view.stride_batch % together ||
      !aligned(view.data) || !aligned(other))
    return;
  view.stride_row /= together;
  view.stride_batch /= together;
  D /= together;
  bytes = 16;
}

LaunchPlan groups_plan(int64_t groups, int lanes, DeviceLimits limits) {
  return items_plan(groups, kPackThreads / lanes, kPackThreads, limits);
}

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cuda_pack(int64_t element_bytes, vqfast_rows values, int64_t D, const int64_t *grains, int64_t B,
                                int64_t Hc, int64_t Wc, int64_t num_grains, int64_t region, int64_t capacity,
                                void *packed, int32_t *cu_seqlens, int64_t *positions, int64_t *grain_ids,
                                void *scratch, int device, void *stream) {
  Launcher launch(device, stream);
  const GrainGrid grid = {B, Hc, Wc, (int)num_grains};
  int64_t *table = static_cast<int64_t *>(scratch), *lengths = table + B * num_grains * Hc;
  if (B == 0) launch.zero(cu_seqlens, sizeof *cu_seqlens);
  if (B > 0) launch(pack_rows, groups_plan(B, 32, launch.limits()), grid, grains, table, lengths);
  widen_elements(element_bytes, values, D, packed);
  const bool known = with_bytes(element_bytes, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    const PackArguments<T> args = {
        grid,       values,    D,        grains, table, lengths, region != 0, capacity, static_cast<T *>(packed),
        cu_seqlens, positions, grain_ids};
    if (B > 0) launch(pack_cells<T>, groups_plan(B * grid.cells(), 32, launch.limits()), args);
    if (capacity > 0) launch(pack_tail<T>, groups_plan(capacity, 1, launch.limits()), args);
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}

extern "C" int vqfast_cuda_unpack(int64_t element_bytes, vqfast_rows packed, int64_t D, const int32_t *cu_seqlens,
                                  const int64_t *positions, const int64_t *grain_ids, const int64_t *grains, int64_t B,
                                  int64_t Hc, int64_t Wc, int64_t num_grains, int64_t replicate, void *out,
                                  void *scratch, int device, void *stream) {
  Launcher launch(device, stream);
  const GrainGrid grid = {B, Hc, Wc, (int)num_grains};
  const Tokens tokens = {grid, packed.batch * packed.rows, cu_seqlens, positions, grain_ids, grains};
  int64_t *slots = static_cast<int64_t *>(scratch);
  const int64_t places = B * grid.positions();
  if (places == 0) return launch.code();
  launch.zero(slots, places * (int64_t)sizeof *slots);
  if (tokens.T > 0) launch(unpack_slots, groups_plan(tokens.T, 1, launch.limits()), tokens, slots);
  widen_elements(element_bytes, packed, D, out);
  const bool known = with_bytes(element_bytes, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    const bool single = D < 8;
    launch(single ? unpack_grid<T, 1> : unpack_grid<T, 32>, groups_plan(places, single ? 1 : 32, launch.limits()), grid,
           packed, D, grains, slots, replicate != 0, static_cast<T *>(out));
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}

extern "C" int vqfast_cuda_unpack_backward(vqfast_dtype dtype, vqfast_rows grad, int64_t D, const int32_t *cu_seqlens,
                                           const int64_t *positions, const int64_t *grain_ids, int64_t T_tokens,
                                           const int64_t *grains, int64_t B, int64_t Hc, int64_t Wc, int64_t num_grains,
                                           void *grad_packed, void *scratch, int device, void *stream) {
  Launcher launch(device, stream);
  const GrainGrid grid = {B, Hc, Wc, (int)num_grains};
  const Tokens tokens = {grid, T_tokens, cu_seqlens, positions, grain_ids, grains};
  int64_t *slots = static_cast<int64_t *>(scratch);
  launch.zero(slots, B * grid.positions() * (int64_t)sizeof *slots);
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    if (tokens.T == 0) return;
    if (B == 0) {
      launch.zero(grad_packed, tokens.T * D * (int64_t)sizeof(T));
      return;
    }
    launch(unpack_slots, groups_plan(tokens.T, 1, launch.limits()), tokens, slots);
    const bool single = D < 8;
    launch(single ? unpack_sum<T, 1> : unpack_sum<T, 32>, groups_plan(tokens.T, single ? 1 : 32, launch.limits()),
           tokens, grad, D, slots, static_cast<T *>(grad_packed));
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}

extern "C" int vqfast_cuda_position_mask(const int64_t *positions, const int64_t *grain_ids, const int64_t *grain,
                                         int64_t B, int64_t L, int64_t Hc, int64_t Wc, int64_t num_grains, int64_t V,
                                         uint8_t *mask, int device, void *stream) {
  Launcher launch(device, stream);
  const GrainGrid grid = {B, Hc, Wc, (int)num_grains};
  if (B > 0)
    launch(position_mask, items_plan(B, 1, kPackThreads, launch.limits()), grid, positions, grain_ids, grain, L, V,
           mask);
  return launch.code();
}

extern "C" int vqfast_cuda_grain_entropy(vqfast_dtype dtype, const void *images, int64_t B, int64_t C, int64_t H,
                                         int64_t W, const int64_t *strides, int64_t P, int64_t bins, double sigma,
                                         double lowest, double highest, void *entropy, int device, void *stream) {
  Launcher launch(device, stream);
  const EntropyArguments args = {C,          H / P,      W / P,      B * (H / P) * (W / P),
                                 P,          strides[0], strides[1], strides[2],
                                 strides[3], (int)bins,  lowest,     (highest - lowest) / (double)(bins - 1),
                                 sigma};
  const bool known = with_element(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    if (args.patches == 0) return;
    LaunchPlan plan = items_plan(args.patches, 1, kPackThreads, launch.limits());
    plan.shared_bytes = bins * (int64_t)sizeof(double);
    launch(grain_entropy<T>, plan, args, static_cast<const T *>(images), static_cast<accumulate_t<T> *>(entropy));
  });
  return known ? launch.code() : (int)VQFAST_BAD_DTYPE;
}
