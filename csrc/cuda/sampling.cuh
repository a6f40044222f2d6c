// Draws of a chain: x_t from x_0, and x_s from the predicted posterior.
#pragma once

#include "diffusion_chain.h"
#include "launch.h"
#include "truncate.cuh"

namespace vqfast {

static __global__ void q_sample_tokens(const int64_t *x0, const int64_t *t, vqfast_levels chain, int64_t tokens,
                                       int64_t L, int64_t K, const int64_t *key, int64_t *x_t) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < tokens; i += (int64_t)gridDim.x * blockDim.x)
    x_t[i] = noised(chain, shares(chain, clamp_index(t[i / L], chain.T + 1)), x0[i],
                    philox((uint64_t)key[0], (uint64_t)key[1], (uint64_t)i, 0), K);
}

template <typename T>
struct SampleArguments {
  const T *logits, *unconditional;  // unconditional: or null
  const int64_t *x_t, *t, *s;
  vqfast_levels chain;
  int64_t rows, L;
  int K;
  const int64_t *known;  // or null
  bool marginal;
  accumulate_t<T> inverse_temperature, guidance;
  Truncation truncation;
  const int64_t *key;
  int64_t *x_s;
  bool keep;  // the row stays in shared memory
};

// What is known of a row's draw before its logits are read.
struct RowDraw {
  ReverseDraw draw;
  unsigned x_t;  // kNoCode: the mask state
  double unshift, within;
};

template <typename T>
__device__ RowDraw row_draw(const SampleArguments<T> &args, int64_t row) {
  const int64_t b = row / args.L, K = args.K, x_t = clamp_index(args.x_t[row], states(args.chain, K));
  const int64_t t = clamp_index(args.t[b], args.chain.T + 1), s = clamp_index(args.s[b], args.chain.T + 1);
  const int64_t known = args.known ? min(args.known[row], K - 1) : -1;
  const uint64_t key0 = (uint64_t)args.key[0], key1 = (uint64_t)args.key[1];
  RowDraw first;
  first.draw = begin_draw(args.chain, t, s, x_t, known, K, args.marginal, philox(key0, key1, (uint64_t)row, 0));
  first.x_t = x_t < K ? (unsigned)x_t : kNoCode;
  first.unshift = exp(-first.draw.step.shift);
  first.within = uniform(philox(key0, key1, (uint64_t)row, 1).first);
  return first;
}

// A code whose weight the row does not hold.
template <typename R>
struct Apart {
  unsigned code;
  R weight;
};

// The first code whose cumulative weight exceeds `target`, in the order of the codes; the last code of any weight where
// rounding leaves none. All threads of the block call it and get the same.
template <typename Row, typename R = typename Row::R, int V = Row::kVectorSize>
__device__ int locate(const Row &scores, const Apart<R> &apart, double target, double *warps, int *found) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) found[0] = (int)kNoCode, found[1] = 0;
  double before = 0;  // weight of the stripes gone through
  int last = 0;
  for (unsigned s = 0; s < scores.stripes(); ++s) {
    unsigned first;
    R weights[V];
    scores.stripe(s, first, weights);
    double own = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (first + j == apart.code) weights[j] = apart.weight;
      own += (double)weights[j];
      if (weights[j] > 0) last = (int)first + j;
    }
    double upto = own;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const double left = __shfl_up_sync(kFullWarp, upto, step);
      if (lane >= step) upto += left;
    }
    double start = __shfl_up_sync(kFullWarp, upto, 1);
    if (lane == 0) start = 0;
    // What was read of the stripe before was read before its last barrier, or before this one.
    if (lane == 31) warps[warp] = upto;
    __syncthreads();
    double offset = before;
    for (int w = 0; w < (int)(blockDim.x / 32); ++w) {
      if (w < warp) offset += warps[w];
      before += warps[w];
    }
    if (offset + upto > target) {
      // Only codes of some weight: rounding may put the target on the edge of this vector.
      int code = -1;
      double cumulative = offset + start;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const bool crossed = code >= 0 && cumulative > target;
        cumulative += (double)weights[j];
        if (weights[j] > 0 && !crossed) code = (int)first + j;
      }
      if (code >= 0) atomicMin(found, code);
    }
    __syncthreads();
    if (found[0] != (int)kNoCode) break;
  }
  if (found[0] == (int)kNoCode) atomicMax(found + 1, last);
  __syncthreads();
  return found[0] != (int)kNoCode ? found[0] : found[1];
}

template <typename T, int V>
__global__ void __launch_bounds__(kMaxRowThreads, 1) p_sample_rows(SampleArguments<T> args) {
  typedef accumulate_t<T> R;
  VQFAST_DYNAMIC_SHARED(memory);
  VQFAST_SHARED(R, partial, [32]);
  VQFAST_SHARED(int, counts, [32]);
  VQFAST_SHARED(double, warps, [32]);
  VQFAST_SHARED(int, found, [2]);
  VQFAST_SHARED(RowDraw, shared_draw, [1]);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    __syncthreads();  // the previous row's draw may still be read
    if (threadIdx.x == 0) shared_draw[0] = row_draw(args, row);
    __syncthreads();
    ReverseDraw draw = shared_draw[0].draw;
    const unsigned x_t = shared_draw[0].x_t;
    if (draw.decided) {
      if (threadIdx.x == 0) args.x_s[row] = draw.x_s;
      continue;
    }
    const int64_t offset = row * args.K;
    const ScoreSource<T> source = {args.logits + offset, args.unconditional ? args.unconditional + offset : nullptr,
                                   args.guidance};
    SoftmaxRow<T, V, LikelyCodes<R>> scores(source, args.K, args.keep ? reinterpret_cast<R *>(memory) : nullptr);
    const R largest = block_reduce(scores.largest(), Max(), partial);
    scores.scale(largest, args.inverse_temperature);
    LikelyCodes<R> likely;
    if (args.truncation.any(args.K))
      likely = Truncate(scores, args.K, largest, BlockSum<R>{partial, counts})(args.truncation);
    Apart<R> apart = {x_t, 0};
    if (x_t != kNoCode) {
      const R score = source.score(x_t);
      if (likely.kept(score, x_t)) apart.weight = scores.weight_of(score) * (R)shared_draw[0].unshift;
    }
    likely.without = x_t;
    const R total = block_reduce(scores.weigh(likely), Add(), partial) + apart.weight;

    // Every thread finds the same: what they compare comes from shared memory.
    settle_draw(draw, args.chain, (double)apart.weight / (double)total, total > 0 && total - total == 0, args.K);
    if (!draw.decided) draw.x_s = locate(scores, apart, shared_draw[0].within * (double)total, warps, found);
    if (threadIdx.x == 0) args.x_s[row] = draw.x_s;
  }
}

}  // namespace vqfast
