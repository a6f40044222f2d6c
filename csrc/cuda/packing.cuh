// Codes of images with several grains: into one sequence an image, back onto the fine grid, and the gradient of that.
//
// Elements are copied, not computed with, but in the gradient: T is a type of their size, 16 bytes where rows allow it.
#pragma once

#include "device.cuh"
#include "grain_grid.h"
#include "launch.h"

namespace vqfast {

constexpr int kPackThreads = 256;

// Lanes that share one vector: a warp, or one thread where a vector is one element.
template <int kLanes>
struct Group {
  int64_t index, count;
  int lane;

  __device__ __forceinline__ Group()
      : index(((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / kLanes),
        count((int64_t)gridDim.x * blockDim.x / kLanes),
        lane((int)threadIdx.x % kLanes) {}
};

// ---- pack ----------------------------------------------------------------------------------------------------------

// table (B, G, Hc): tokens of the image before those of this grain in this row of cells. lengths (B). A warp an image.
static __global__ void __launch_bounds__(kPackThreads, 2)
    pack_rows(GrainGrid grid, const int64_t *grains, int64_t *table, int64_t *lengths) {
  const Group<32> group;
  for (int64_t b = group.index; b < grid.images; b += group.count) {
    const int64_t *map = grains + b * grid.cells();
    int64_t before = 0;
    for (int g = 0; g < grid.grains; ++g)
      for (int64_t first = 0; first < grid.cells_y; first += 32) {
        const int64_t cy = first + group.lane;
        int64_t tokens = 0;
        if (cy < grid.cells_y) {
          for (int64_t cx = 0; cx < grid.cells_x; ++cx) tokens += grid.clamped(map[cy * grid.cells_x + cx]) == g;
          tokens <<= 2 * g;
        }
        int64_t upto = tokens;
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) {
          const int64_t left = __shfl_up_sync(kFullWarp, upto, step);
          if (group.lane >= step) upto += left;
        }
        if (cy < grid.cells_y) table[(b * grid.grains + g) * grid.cells_y + cy] = before + upto - tokens;
        before += __shfl_sync(kFullWarp, upto, 31);
      }
    if (group.lane == 0) lengths[b] = before;
  }
}

template <typename T>
struct PackArguments {
  GrainGrid grid;
  Rows<T> values;
  int64_t D;
  const int64_t *grains, *table, *lengths;
  bool region;
  int64_t capacity;
  T *packed;
  int32_t *cu_seqlens;
  int64_t *positions, *grain_ids;
};

// A warp a cell.
template <typename T>
__global__ void __launch_bounds__(kPackThreads, 2) pack_cells(PackArguments<T> args) {
  const GrainGrid &grid = args.grid;
  const Group<32> group;
  for (int64_t cell = group.index; cell < grid.images * grid.cells(); cell += group.count) {
    const int64_t b = cell / grid.cells(), cy = cell / grid.cells_x % grid.cells_y, cx = cell % grid.cells_x;
    const int g = grid.clamped(args.grains[cell]);
    int64_t start = 0, before = 0, in_row = 0;
    for (int64_t i = group.lane; i < b; i += 32) start += args.lengths[i];
    for (int64_t i = group.lane; i < grid.cells_x; i += 32) {
      const bool same = grid.clamped(args.grains[cell - cx + i]) == g;
      before += same && i < cx;
      in_row += same;
    }
    start = warp_sum(start);
    before = warp_sum(before);
    in_row = warp_sum(in_row);
    if (group.lane == 0 && cy == 0 && cx == 0) {
      if (b == 0) args.cu_seqlens[0] = 0;
      args.cu_seqlens[b + 1] = (int32_t)min(start + args.lengths[b], args.capacity);
    }
    start += args.table[(b * grid.grains + g) * grid.cells_y + cy] + (args.region ? before << 2 * g : before << g);
    const int64_t pitch = args.region ? (int64_t)1 << g : in_row << g, edge = (int64_t)1 << g;
    for (int64_t code = 0; code < edge * edge; ++code) {
      const int64_t i = code >> g, j = code & (edge - 1), token = start + i * pitch + j;
      if (token >= args.capacity) continue;
      const int64_t y = (cy << g) + i, x = (cx << g) + j;
      if (group.lane == 0) {
        args.positions[token] = y * (grid.cells_x << g) + x;
        args.grain_ids[token] = g;
      }
      const int64_t place = b * grid.positions() + (y << grid.shift(g)) * grid.width() + (x << grid.shift(g));
      const T *from = args.values.data + args.values.offset(place);
      for (int64_t d = group.lane; d < args.D; d += 32)
        args.packed[token * args.D + d] = from[d * args.values.stride_feature];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kPackThreads, 2) pack_tail(PackArguments<T> args) {
  const int64_t used = args.cu_seqlens[args.grid.images];
  const int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = used * args.D + first; i < args.capacity * args.D; i += step) args.packed[i] = T{};
  for (int64_t i = used + first; i < args.capacity; i += step) args.positions[i] = args.grain_ids[i] = -1;
}

// ---- unpack --------------------------------------------------------------------------------------------------------

struct Tokens {
  GrainGrid grid;
  int64_t T;
  const int32_t *cu_seqlens;
  const int64_t *positions, *grain_ids, *grains;
};

// The token's place, its code's top left on the fine grid of the batch, and log2 of the edge that it covers; false
// where it does not count.
__device__ __forceinline__ bool place_of(const Tokens &tokens, int64_t t, int64_t &place, int &shift) {
  const GrainGrid &grid = tokens.grid;
  int64_t low = 0, high = grid.images;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (tokens.cu_seqlens[middle] <= t)
      low = middle;
    else
      high = middle;
  }
  int64_t y, x;
  const int64_t grain = tokens.grain_ids[t];
  if (t < tokens.cu_seqlens[low] || t >= tokens.cu_seqlens[low + 1] ||
      !grid.place(tokens.grains + low * grid.cells(), tokens.positions[t], grain, y, x))
    return false;
  shift = grid.shift((int)grain);
  place = low * grid.positions() + (y << shift) * grid.width() + (x << shift);
  return true;
}

// slots (B * Hf * Wf), zero before: the token at each place, plus one. The later counts, in whatever order threads
// come.
static __global__ void __launch_bounds__(kPackThreads, 2) unpack_slots(Tokens tokens, int64_t *slots) {
  const Group<1> group;
  for (int64_t t = group.index; t < tokens.T; t += group.count) {
    int64_t place;
    int shift;
    if (place_of(tokens, t, place, shift))
      atomicMax(reinterpret_cast<unsigned long long *>(slots + place), (unsigned long long)(t + 1));
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kPackThreads, 2)
    unpack_grid(GrainGrid grid, Rows<T> packed, int64_t D, const int64_t *grains, const int64_t *slots, bool replicate,
                T *out) {
  const Group<kLanes> group;
  for (int64_t n = group.index; n < grid.images * grid.positions(); n += group.count) {
    const int64_t b = n / grid.positions(), y = n / grid.width() % grid.height(), x = n % grid.width();
    const int64_t cell = (b * grid.cells_y + (y >> (grid.grains - 1))) * grid.cells_x + (x >> (grid.grains - 1));
    const int shift = grid.shift(grid.clamped(grains[cell]));
    const int64_t top = y >> shift << shift, left = x >> shift << shift;
    int64_t slot = slots[b * grid.positions() + top * grid.width() + left] - 1;
    if (!replicate && (top != y || left != x)) slot = -1;
    const T *from = packed.data + (slot < 0 ? 0 : packed.offset(slot));
    for (int64_t d = group.lane; d < D; d += kLanes) out[n * D + d] = slot < 0 ? T{} : from[d * packed.stride_feature];
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kPackThreads, 2)
    unpack_sum(Tokens tokens, Rows<T> grad, int64_t D, const int64_t *slots, T *out) {
  const Group<kLanes> group;
  for (int64_t t = group.index; t < tokens.T; t += group.count) {
    int64_t place = 0;
    int shift = 0;
    const bool there = place_of(tokens, t, place, shift) && slots[place] == t + 1;
    for (int64_t d = group.lane; d < D; d += kLanes) {
      accumulate_t<T> total = 0;
      if (there)
        for (int64_t i = 0; i < (int64_t)1 << 2 * shift; ++i) {
          const int64_t n = place + (i >> shift) * tokens.grid.width() + (i & (((int64_t)1 << shift) - 1));
          total += widen(grad.data[grad.offset(n) + d * grad.stride_feature]);
        }
      narrow(total, out[t * D + d]);
    }
  }
}

// ---- the mask over the next position -------------------------------------------------------------------------------

// A block an image. Every position is compared with every token, in chunks that the block reads together: nothing is
// written twice.
static __global__ void __launch_bounds__(kPackThreads, 2)
    position_mask(GrainGrid grid, const int64_t *positions, const int64_t *grain_ids, const int64_t *grain_of,
                  int64_t L, int64_t V, uint8_t *mask) {
  VQFAST_SHARED(int64_t, token, [kPackThreads]);  // own tokens' positions, else -1
  VQFAST_SHARED(int64_t, cell, [kPackThreads]);   // -1 where there is no token
  VQFAST_SHARED(int, partial, [32]);
  for (int64_t b = blockIdx.x; b < grid.images; b += gridDim.x) {
    const int64_t *position = positions + b * L, *id = grain_ids + b * L;
    const int grain = grid.clamped(grain_of[b]);
    const int64_t count = grid.cells() << 2 * grain;
    int found = 0;
    for (int64_t i = threadIdx.x; i < L; i += kPackThreads) found += id[i] == grain && position[i] == count + 1;
    const bool ended = block_reduce(found, Add(), partial) > 0;
    int unfinished = 0;
    for (int64_t first = 0; first < V; first += kPackThreads) {
      const int64_t p = first + threadIdx.x;
      int64_t own_y = 0, own_x = 0;
      if (p < count) grid.cell(p, grain, own_y, own_x);
      const int64_t own_cell = own_y * grid.cells_x + own_x;
      bool free = p < count, begun = grain == grid.grains - 1;
      for (int64_t chunk = 0; chunk < L; chunk += kPackThreads) {
        __syncthreads();  // the chunk before may still be read
        const int64_t i = chunk + threadIdx.x;
        token[threadIdx.x] = cell[threadIdx.x] = -1;
        if (i < L && grid.in_range(position[i], id[i])) {
          int64_t y, x;
          grid.cell(position[i], (int)id[i], y, x);
          cell[threadIdx.x] = y * grid.cells_x + x;
          if (id[i] == grain) token[threadIdx.x] = position[i];
        }
        __syncthreads();
        const int n = (int)min(L - chunk, (int64_t)kPackThreads);
        for (int k = 0; k < n; ++k)
          if (cell[k] == own_cell) {
            begun = begun || token[k] >= 0;
            free = free && token[k] >= 0 && token[k] != p;
          }
      }
      unfinished += free && begun;
      if (p < V) mask[b * V + p] = ended ? p == count : free;
    }
    unfinished = block_reduce(unfinished, Add(), partial);
    // The thread that wrote the entry of eos before.
    if (threadIdx.x == (count + 1) % kPackThreads && !ended) mask[b * V + count + 1] = unfinished == 0;
  }
}

// ---- entropy of a patch --------------------------------------------------------------------------------------------

struct EntropyArguments {
  int64_t C, rows, columns, patches, P;
  int64_t stride_batch, stride_channel, stride_y, stride_x;
  int bins;
  double lowest, spacing, sigma;
};

__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }

// A block a patch: the block reads pixels together, warps share them, lanes have bins. density: dynamic, of `bins`.
template <typename T>
__global__ void __launch_bounds__(kPackThreads, 2)
    grain_entropy(EntropyArguments args, const T *images, accumulate_t<T> *entropy) {
  typedef accumulate_t<T> R;
  constexpr int kWarps = kPackThreads / 32;
  VQFAST_DYNAMIC_SHARED(memory);
  VQFAST_SHARED(double, grey, [kPackThreads]);
  VQFAST_SHARED(double, sums, [kWarps][32]);
  VQFAST_SHARED(double, partial, [32]);
  double *density = reinterpret_cast<double *>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t pixels = args.P * args.P;
  for (int64_t patch = blockIdx.x; patch < args.patches; patch += gridDim.x) {
    const int64_t b = patch / args.columns / args.rows, y = patch / args.columns % args.rows, x = patch % args.columns;
    const T *first = images + b * args.stride_batch + y * args.P * args.stride_y + x * args.P * args.stride_x;
    for (int bins = 0; bins < args.bins; bins += 32) {
      const double bin = args.lowest + (bins + lane) * args.spacing;
      double sum = 0;
      for (int64_t chunk = 0; chunk < pixels; chunk += kPackThreads) {
        __syncthreads();  // the chunk before may still be read
        const int64_t i = chunk + threadIdx.x;
        if (i < pixels) {
          const T *pixel = first + i / args.P * args.stride_y + i % args.P * args.stride_x;
          double value = (double)widen(*pixel);
          if (args.C == 3)  // ITU-R BT.601
            value = 0.2989 * value + 0.587 * (double)widen(pixel[args.stride_channel]) +
                    0.114 * (double)widen(pixel[2 * args.stride_channel]);
          grey[threadIdx.x] = value;
        }
        __syncthreads();
        const int n = (int)min(pixels - chunk, (int64_t)kPackThreads);
        for (int k = warp; k < n; k += kWarps) {
          const R distance = (R)((grey[k] - bin) / args.sigma);
          sum += (double)exponential(-distance * distance / 2);
        }
      }
      sums[warp][lane] = sum;
      __syncthreads();
      if (warp == 0 && bins + lane < args.bins) {
        sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += sums[w][lane];
        density[bins + lane] = sum / (double)pixels;
      }
    }
    __syncthreads();
    double total = 0, result = 0;
    for (int k = threadIdx.x; k < args.bins; k += kPackThreads) total += density[k];
    total = block_reduce(total, Add(), partial);
    for (int k = threadIdx.x; k < args.bins; k += kPackThreads) {
      const double p = density[k] / (total + 1e-40) + 1e-40;
      result -= p * log(p);
    }
    result = block_reduce(result, Add(), partial);
    if (threadIdx.x == 0) entropy[patch] = (R)result;
  }
}

}  // namespace vqfast
