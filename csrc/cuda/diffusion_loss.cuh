// Loss of a diffusion step and its gradient, one block a row of logits; and the row scaling of the backward pass.
// kernels/diffusion_loss/README.md derives the formulas.
#pragma once

#include "diffusion_divergence.h"
#include "launch.h"
#include "softmax_row.cuh"

namespace vqfast {

// Two sums at once.
template <typename R>
struct Pair {
  R logs, curvature;
  __device__ __forceinline__ Pair operator+(const Pair &other) const {
    return {logs + other.logs, curvature + other.curvature};
  }
};
template <typename R>
__device__ __forceinline__ Pair<R> __shfl_xor_sync(unsigned mask, const Pair<R> &v, int step) {
  return {::__shfl_xor_sync(mask, v.logs, step), ::__shfl_xor_sync(mask, v.curvature, step)};
}

// log(1 + r) - r for 0 <= r < 1e36, relative error below 2e-6; as csrc/cpu/simd_math.h has it for vectors.
__device__ __forceinline__ float log1p_minus(float r) {
  // 1 + r = 2^e (1 + f), f in [-1/3, 1/3]. 2^-e and 2^-e - 1 are exact, so f has one rounding, and none where e = 0.
  const int e = (__float_as_int(1.0f + r) - __float_as_int(2.0f / 3.0f)) >> 23;
  const float s = __int_as_float(__float_as_int(1.0f) - e * (1 << 23));
  const float f = r * s + (s - 1.0f);
  float p = -0.12577850f;
  p = p * f + 0.13746133f;
  p = p * f - 0.12255136f;
  p = p * f + 0.14056425f;
  p = p * f - 0.16675519f;
  p = p * f + 0.20007181f;
  p = p * f - 0.24999902f;
  p = p * f + 0.33333274f;
  const float square = f * f;
  return ((float)e * 0x1.62e430p-1f + (f - r)) + (square * f * p - 0.5f * square);
}

// r / (1 + r), the share of the signal in a code's probability.
__device__ __forceinline__ float share_of(float r) { return __fdividef(r, 1 + r); }
__device__ __forceinline__ double share_of(double r) { return r / (1 + r); }

template <typename T>
struct LossArguments {
  const T *logits;
  const int64_t *x0, *x_t, *t, *s;
  vqfast_levels chain;
  int64_t rows, L;
  int K;
  const double *scale;
  bool marginal;
  double aux_weight;
  accumulate_t<T> *loss;
  T *grad;    // or null
  bool keep;  // the row stays in shared memory
};

// What a block needs of its token besides the logits' row, and what it finds out about the row.
template <typename R>
struct RowToken {
  LossToken token;
  bool reads;
  unsigned x0, x_t;  // x_t: kNoCode where it is x_0 or the mask state
  double logit_x0, logit_x_t, scale;
  R ratio;  // r of a code of weight 1 in a softmax whose weights add up to 1
  R base, slope, at_x0, at_x_t;
};

template <typename T, typename R = accumulate_t<T>>
__device__ RowToken<R> row_token(const LossArguments<T> &args, int64_t row) {
  const int64_t b = row / args.L, K = args.K, T_levels = args.chain.T + 1;
  const int64_t x0 = clamp_index(args.x0[row], K), x_t = clamp_index(args.x_t[row], states(args.chain, K));
  RowToken<R> x;
  x.token = loss_token(args.chain, clamp_index(args.t[b], T_levels), clamp_index(args.s[b], T_levels), x_t, x0, K,
                       args.marginal);
  x.scale = args.scale[row];
  x.reads = x.token.reads(x.scale, args.aux_weight);
  x.x0 = (unsigned)x0;
  x.x_t = x.token.apart ? (unsigned)x_t : kNoCode;
  x.ratio = x.token.noisy() ? (R)(x.token.step.signal / (args.chain.noise ? x.token.step.spread : x.token.noise_0)) : 0;
  if (x.reads) {
    const T *logits = args.logits + row * K;
    x.logit_x0 = widen(logits[x0]);
    x.logit_x_t = x.token.apart ? widen(logits[x_t]) : 0;
  }
  return x;
}

template <typename T, int V>
__global__ void __launch_bounds__(kMaxRowThreads, 1) diffusion_loss_rows(LossArguments<T> args) {
  typedef accumulate_t<T> R;
  VQFAST_DYNAMIC_SHARED(memory);
  VQFAST_SHARED(R, partial, [32]);
  VQFAST_SHARED(Pair<R>, partial_pairs, [32]);
  VQFAST_SHARED(RowToken<R>, shared_token, [1]);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    T *grad = args.grad ? args.grad + row * args.K : nullptr;
    __syncthreads();  // what is known of the previous row may still be read
    if (threadIdx.x == 0) shared_token[0] = row_token(args, row);
    __syncthreads();
    RowToken<R> &x = shared_token[0];
    if (!x.reads) {  // nothing to learn, and the logits may be anything
      if (grad) fill_row<T, V>(grad, args.K, 0);
      if (threadIdx.x == 0) args.loss[row] = 0;
      continue;
    }
    SoftmaxRow<T, V, OtherCodes> scores({args.logits + row * args.K, nullptr, 0}, args.K,
                                        args.keep ? reinterpret_cast<R *>(memory) : nullptr);
    const R largest = block_reduce(scores.largest(), Max(), partial);
    scores.scale(largest, 1);
    const R others = block_reduce(scores.weigh({x.x0, x.x_t}), Add(), partial);
    const double margin = x.logit_x0 - (double)largest;
    const double margin_t = x.x_t != kNoCode ? x.logit_x_t - (double)largest : 0;
    // In R, by every thread: what the exact total is needed for is left to one of them.
    const R total = others + exp((R)(margin - (x.x_t == kNoCode ? x.token.step.shift : 0))) +
                    (x.x_t != kNoCode ? exp((R)(margin_t - x.token.step.shift)) : 0);
    if (total != total) {
      if (grad) fill_row<T, V>(grad, args.K, (R)NAN);
      if (threadIdx.x == 0) args.loss[row] = (R)NAN;
      continue;
    }

    const double *noise = args.chain.noise;
    const R ratio = x.ratio / total;
    // A code that no noise gives has r = infinity, and noise times r is what counts: with this it is right to 1e-18.
    const auto noise_at = [&](unsigned code) { return noise ? (R)fmax(noise[code], 1e-18) : (R)1; };
    const auto odds = [&](R weight, R m) { return noise ? ratio * weight / m : ratio * weight; };
    const bool noisy = ratio > 0;
    Pair<R> sums = {0, 0};
    if (noisy) {
      scores.for_each([&](unsigned first, const R(&weights)[V]) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const R m = noise_at(first + j), r = odds(weights[j], m);
          sums.logs += m * log1p_minus(r);
          sums.curvature += ratio * weights[j] * share_of(r);
        }
      });
      sums = block_reduce(sums, Add(), partial_pairs);
    }
    if (threadIdx.x == 0) {
      const double spread = noise ? x.token.step.spread : x.token.noise_0;
      const LossRow result = finish_loss(x.token, margin, margin_t, (double)others, spread * (double)sums.logs,
                                         spread * (double)sums.curvature, x.scale, args.aux_weight);
      args.loss[row] = (R)result.loss;
      x.base = (R)result.gradient.base;
      x.slope = (R)result.gradient.slope;
      x.at_x0 = (R)result.gradient.at_x0;
      x.at_x_t = (R)result.gradient.at_x_t;
    }
    if (!grad) continue;
    __syncthreads();
    const R base = x.base, slope = x.slope;
    scores.for_each([&](unsigned first, const R(&weights)[V]) {
      R values[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const R share = noisy ? share_of(odds(weights[j], noise_at(first + j))) : 0;
        values[j] = weights[j] * (base + slope * share);
      }
      store<T, V>(grad + first, values);
    });
    // The two codes that differ, by the thread that has just written them.
    if (threadIdx.x == scores.owner((int)x.x0)) narrow(x.at_x0, grad[x.x0]);
    if (x.x_t != kNoCode && threadIdx.x == scores.owner((int)x.x_t)) narrow(x.at_x_t, grad[x.x_t]);
  }
}

// rows (R, K) *= scale, one warp a row; rows whose scale is 1 are not touched.
template <typename T, int V>
__global__ void scale_rows(T *rows, int64_t R, int64_t K, const accumulate_t<T> *scale, int64_t stride) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = (int64_t)gridDim.x * (blockDim.x / 32);
  for (int64_t r = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; r < R; r += warps) {
    const accumulate_t<T> factor = scale[r * stride];
    if (factor == 1) continue;
    for (int64_t k = lane * V; k < K; k += 32 * V) {
      accumulate_t<T> values[V];
      load<T, V>(rows + r * K + k, values);
#pragma unroll
      for (int j = 0; j < V; ++j) values[j] *= factor;
      store<T, V>(rows + r * K + k, values);
    }
  }
}

}  // namespace vqfast
