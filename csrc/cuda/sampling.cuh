// Draws of the uniform chain: x_t from x_0, and x_s from the predicted posterior.
#pragma once

#include "launch.h"
#include "philox.h"
#include "softmax_row.cuh"

namespace vqfast {

static __global__ void uniform_q_sample(const int64_t *x0, const int64_t *t, const double *alpha_bar, int64_t T,
                                        int64_t tokens, int64_t L, int64_t K, const int64_t *key, int64_t *x_t) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < tokens; i += (int64_t)gridDim.x * blockDim.x) {
    const RandomBits bits = philox((uint64_t)key[0], (uint64_t)key[1], (uint64_t)i, 0);
    x_t[i] = uniform(bits.first) < alpha_bar[clamp_index(t[i / L], T + 1)] ? x0[i] : below(bits.second, K);
  }
}

// What is known of a row's draw before its logits are read. x_s is x_t with weight a (alpha_s p_{x_t} + nu), any code
// with weight `replace`, a code of p with weight `predict`; `part` chooses among the three.
struct Draw {
  bool reads;  // the logits decide
  int64_t x_s, x_t, any_code;
  double part, within;
  double alpha_s, a, noise, replace, predict;
};

// known: the code that is given, or below 0.
__device__ inline Draw begin_draw(const int64_t *key, int64_t row, int64_t x_t, int64_t known, double alpha_t,
                                  double alpha_s, int64_t K) {
  const RandomBits bits = philox((uint64_t)key[0], (uint64_t)key[1], (uint64_t)row, 0);
  Draw draw;
  draw.x_t = clamp_index(x_t, K);
  draw.any_code = below(bits.second, K);
  draw.part = uniform(bits.first);
  draw.within = uniform(philox((uint64_t)key[0], (uint64_t)key[1], (uint64_t)row, 1).first);
  draw.alpha_s = alpha_s;
  draw.a = alpha_t / alpha_s;
  draw.noise = (1 - alpha_s) / (double)K;
  draw.replace = (1 - draw.a) * draw.noise;
  draw.predict = (1 - draw.a) * alpha_s / (double)K;
  draw.reads = false;
  draw.x_s = draw.x_t;
  if (known >= 0) {
    draw.x_s = draw.part < alpha_s ? min(known, K - 1) : draw.any_code;
    return draw;
  }
  // The weight of staying rises with p_{x_t}. Where even p_{x_t} = 0 means to stay, the logits need not be read: most
  // tokens of a short step. The margin covers rounding in the comparison that p_{x_t} would be put to.
  const double least = draw.a * draw.noise;
  draw.reads = !(draw.part * (least + draw.replace + draw.predict) < least * (1 - 1e-12));
  return draw;
}

template <typename T>
struct SampleArguments {
  const T *logits;
  const int64_t *x_t, *t, *s;
  const double *alpha_bar;
  int64_t T_levels, rows, L;
  int K;
  const int64_t *known;  // or null
  accumulate_t<T> inverse_temperature;
  const int64_t *key;
  int64_t *x_s;
  bool keep;  // the row stays in shared memory
};

constexpr int kNoCode = 0x7fffffff;

// The first code whose cumulative weight exceeds `target`, in the order of the codes; the last code of any weight where
// rounding leaves none. All threads of the block call it and get the same.
template <typename T, int V>
__device__ int locate(const SoftmaxRow<T, V> &scores, double target, double *warps, int *found) {
  typedef accumulate_t<T> R;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) found[0] = kNoCode, found[1] = 0;
  double before = 0;  // weight of the stripes gone through
  int last = 0;
  for (unsigned s = 0; s < scores.stripes(); ++s) {
    unsigned first;
    R weights[V];
    scores.stripe(s, first, weights);
    double own = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) {
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
    if (found[0] != kNoCode) break;
  }
  if (found[0] == kNoCode) atomicMax(found + 1, last);
  __syncthreads();
  return found[0] != kNoCode ? found[0] : found[1];
}

template <typename T, int V>
__global__ void __launch_bounds__(kMaxRowThreads, 1) uniform_p_sample(SampleArguments<T> args) {
  typedef accumulate_t<T> R;
  VQFAST_DYNAMIC_SHARED(memory);
  VQFAST_SHARED(R, partial, [32]);
  VQFAST_SHARED(double, warps, [32]);
  VQFAST_SHARED(int, found, [2]);
  VQFAST_SHARED(Draw, shared_draw, [1]);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    __syncthreads();  // the previous row's draw may still be read
    if (threadIdx.x == 0) {
      const int64_t b = row / args.L, known = args.known ? args.known[row] : -1;
      shared_draw[0] = begin_draw(args.key, row, args.x_t[row], known,
                                  args.alpha_bar[clamp_index(args.t[b], args.T_levels + 1)],
                                  args.alpha_bar[clamp_index(args.s[b], args.T_levels + 1)], args.K);
    }
    __syncthreads();
    const Draw &draw = shared_draw[0];
    if (!draw.reads) {
      if (threadIdx.x == 0) args.x_s[row] = draw.x_s;
      continue;
    }
    const T *logits = args.logits + row * args.K;
    SoftmaxRow<T, V> scores(logits, args.K, args.keep ? reinterpret_cast<R *>(memory) : nullptr);
    const R largest = block_reduce(scores.largest(), Max(), partial);
    const R total = block_reduce(scores.weigh(largest, args.inverse_temperature), Add(), partial);

    // Every thread finds the same: what they compare comes from shared memory.
    int64_t x_s = draw.x_t;
    if (total > 0 && total - total == 0) {
      const double p_stay = (double)scores.weight_of(widen(logits[draw.x_t])) / (double)total;
      const double stay = draw.a * (draw.alpha_s * p_stay + draw.noise);
      const double target = draw.part * (stay + draw.replace + draw.predict);
      if (target < stay)
        x_s = draw.x_t;
      else if (target < stay + draw.replace)
        x_s = draw.any_code;
      else
        x_s = locate(scores, draw.within * (double)total, warps, found);
    }
    if (threadIdx.x == 0) args.x_s[row] = x_s;
  }
}

}  // namespace vqfast
