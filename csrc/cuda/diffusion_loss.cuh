// Uniform diffusion loss and its gradient, one block a row of logits; and the row scaling of the backward pass.
//
// With i = x_t, o = x_0, f_j = a [j = i] + g, m_j = alpha_s p_j + nu, nu = (1 - alpha_s) / K, g = (1 - a) / K, the true
// posterior q_j is f_j nu / Z_q but for j = i and j = o. So the KL needs two sums over the row besides the softmax,
// sum log(1 + y_j) and sum y_j / (1 + y_j) with y_j = alpha_s p_j / nu; kernels/diffusion_loss/README.md has the rest.
#pragma once

#include "launch.h"
#include "softmax_row.cuh"

namespace vqfast {

// What the loss of a row needs besides its logits.
struct UniformStep {
  double alpha_s, a, noise, g;      // noise = nu; 0 at s = 0
  double ratio;                     // alpha_s / nu; 0 where there is no noise, and y_j is then not used
  double normaliser;                // Z_q, of the true posterior
  double other, at_x_t, at_x0;      // q_j, of the true posterior: j elsewhere, j = x_t, j = x_0
  double logit_x_t, logit_x0, scale;
  int x_t, x0;
};

__device__ inline UniformStep uniform_step(const double *alpha_bar, int64_t T, int64_t t, int64_t s, int64_t x_t,
                                           int64_t x0, int64_t K) {
  UniformStep step;
  step.x_t = (int)clamp_index(x_t, K);
  step.x0 = (int)clamp_index(x0, K);
  step.alpha_s = alpha_bar[clamp_index(s, T + 1)];
  step.a = alpha_bar[clamp_index(t, T + 1)] / step.alpha_s;
  step.noise = (1 - step.alpha_s) / (double)K;
  step.g = (1 - step.a) / (double)K;
  step.ratio = step.noise > 0 ? step.alpha_s / step.noise : 0;
  const bool same = step.x_t == step.x0;
  step.normaliser = step.g + step.a * ((same ? step.alpha_s : 0) + step.noise);
  step.other = step.g * step.noise / step.normaliser;
  step.at_x0 = (step.g + (same ? step.a : 0)) * (step.alpha_s + step.noise) / step.normaliser;
  step.at_x_t = same ? step.at_x0 : (step.g + step.a) * step.noise / step.normaliser;
  return step;
}

// Two sums at once.
template <typename R>
struct Pair {
  R logs, shares;
  __device__ __forceinline__ Pair operator+(const Pair &other) const {
    return {logs + other.logs, shares + other.shares};
  }
};
template <typename R>
__device__ __forceinline__ Pair<R> __shfl_xor_sync(unsigned mask, const Pair<R> &v, int step) {
  return {::__shfl_xor_sync(mask, v.logs, step), ::__shfl_xor_sync(mask, v.shares, step)};
}

// y / (1 + y), the share of the signal in m_j.
__device__ __forceinline__ float share_of(float y) { return __fdividef(y, 1 + y); }
__device__ __forceinline__ double share_of(double y) { return y / (1 + y); }

// The KL of one row, from its sums, in float64: near the data it is a small difference of large terms. `total` is the
// softmax normaliser of the largest logit.
__device__ inline double uniform_kl(const UniformStep &step, double largest, double total, double logs) {
  const bool same = step.x_t == step.x0;
  const double p_x0 = exp(step.logit_x0 - largest) / total;
  const double p_x_t = same ? p_x0 : exp(step.logit_x_t - largest) / total;
  // log(Z / Z_q), from the quotient where it is far from 1 and from the difference where it is near.
  const double quotient = (step.g + step.a * (step.alpha_s * p_x_t + step.noise)) / step.normaliser;
  const double difference = step.a * step.alpha_s * (p_x_t - (same ? 1 : 0)) / step.normaliser;
  const double normalisers = quotient < 0.5 ? log(quotient) : log1p(difference);
  if (step.noise <= 0) return largest - step.logit_x0 + log(total) + normalisers;
  const double log_x0 = log1p(step.ratio * p_x0);
  double kl = step.at_x0 * (log1p(step.ratio) - log_x0) - step.other * (logs - log_x0);
  if (!same) {
    const double log_x_t = log1p(step.ratio * p_x_t);
    kl -= (step.at_x_t - step.other) * log_x_t;
  }
  return kl + normalisers;
}

template <typename T>
struct LossArguments {
  const T *logits;
  const int64_t *x0, *x_t, *t, *s;
  const double *alpha_bar;
  int64_t T_levels, rows, L;
  int K;
  const double *scale;
  double aux_weight;
  accumulate_t<T> *loss;
  T *grad;    // or null
  bool keep;  // the row stays in shared memory
};

template <typename T, int V>
__global__ void __launch_bounds__(kMaxRowThreads, 1) uniform_diffusion_loss(LossArguments<T> args) {
  typedef accumulate_t<T> R;
  VQFAST_DYNAMIC_SHARED(memory);
  VQFAST_SHARED(R, partial, [32]);
  VQFAST_SHARED(Pair<R>, partial_pairs, [32]);
  VQFAST_SHARED(UniformStep, shared_step, [1]);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T *logits = args.logits + row * args.K;
    if (args.scale[row] == 0) {  // the token does not count, and its logits may be anything
      if (args.grad != nullptr)
        for (int k = threadIdx.x; k < args.K; k += blockDim.x) narrow((R)0, args.grad[row * args.K + k]);
      if (threadIdx.x == 0) args.loss[row] = 0;
      continue;
    }
    __syncthreads();  // the previous row's step may still be read
    if (threadIdx.x == 0) {
      const int64_t b = row / args.L;
      UniformStep step = uniform_step(args.alpha_bar, args.T_levels, args.t[b], args.s[b], args.x_t[row], args.x0[row],
                                      args.K);
      step.logit_x_t = widen(logits[step.x_t]);
      step.logit_x0 = widen(logits[step.x0]);
      step.scale = args.scale[row];
      shared_step[0] = step;
    }
    SoftmaxRow<T, V> scores(logits, args.K, args.keep ? reinterpret_cast<R *>(memory) : nullptr);
    const R largest = block_reduce(scores.largest(), Max(), partial);  // its barriers publish the step
    const UniformStep &step = shared_step[0];
    const R total = block_reduce(scores.weigh(largest, 1), Add(), partial);

    // No noise: the true posterior is x_0, and no other code's share counts.
    const bool noiseless = step.noise <= 0;
    const R ratio = (R)(step.ratio / (double)total);
    Pair<R> sums = {0, 0};
    if (!noiseless) {
      scores.for_each([&](unsigned, const R(&weights)[V]) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const R y = ratio * weights[j];
          sums.logs += log1p(y);
          sums.shares += share_of(y);
        }
      });
      sums = block_reduce(sums, Add(), partial_pairs);
    }

    if (args.grad != nullptr) {
      T *grad = args.grad + row * args.K;
      const bool same = step.x_t == step.x0;
      const R weight_x_t = scores.weight_of((R)step.logit_x_t), weight_x0 = scores.weight_of((R)step.logit_x0);
      const R p_x_t = weight_x_t / total;
      const R c = (R)(step.a * step.alpha_s) * p_x_t /
                  (R)(step.g + step.a * (step.alpha_s * (double)p_x_t + step.noise));
      const R share_x_t = share_of(ratio * weight_x_t), share_x0 = noiseless ? 1 : share_of(ratio * weight_x0);
      R signal = (R)step.other * sums.shares + (R)(step.at_x0 - step.other) * share_x0;
      if (!same) signal += (R)(step.at_x_t - step.other) * share_x_t;
      const R scale = (R)step.scale, other = (R)step.other, aux = (R)args.aux_weight;
      const R factor = (signal - c + aux) / total;
      scores.for_each([&](unsigned first, const R(&weights)[V]) {
        R values[V];
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] = scale * (weights[j] * factor - other * share_of(ratio * weights[j]));
        store<T, V>(grad + first, values);
      });
      // The two codes that differ, by the thread that has just written them.
      if (threadIdx.x == scores.owner(step.x0)) {
        R value = weight_x0 * factor - (R)step.at_x0 * share_x0 - aux;
        if (same) value += c;
        narrow(scale * value, grad[step.x0]);
      }
      if (!same && threadIdx.x == scores.owner(step.x_t))
        narrow(scale * (weight_x_t * factor - (R)step.at_x_t * share_x_t + c), grad[step.x_t]);
    }
    if (threadIdx.x == 0) {
      double loss = uniform_kl(step, (double)largest, (double)total, (double)sums.logs);
      if (args.aux_weight != 0)
        loss += args.aux_weight * ((double)largest - step.logit_x0 + log((double)total));
      args.loss[row] = (R)loss;
    }
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
