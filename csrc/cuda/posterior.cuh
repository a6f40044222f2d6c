// Log-probabilities of the predicted x_s, and their gradient to the logits, one block a row of logits.
// kernels/posterior/README.md derives the formulas.
#pragma once

#include "diffusion_chain.h"
#include "launch.h"
#include "softmax_row.cuh"

namespace vqfast {

template <typename T>
struct PosteriorArguments {
  const T *logits;
  const int64_t *x_t, *t, *s;
  vqfast_levels chain;
  int64_t rows, L;
  int K;
  bool marginal;
  bool keep;  // the row stays in shared memory
};

// What a block needs of its token besides the logits' row.
struct PosteriorToken {
  Step step;
  unsigned x_t;    // kNoCode: the mask state
  double logit_t;  // of x_t, shifted as the rule asks; -infinity where x_t is no code
  double noise_t;  // of x_t in x_s
  double noise;    // of any code in x_s; of a family with noise of its own, what multiplies it
};

template <typename T>
__device__ PosteriorToken posterior_token(const PosteriorArguments<T> &args, int64_t row) {
  const int64_t b = row / args.L, K = args.K, T_levels = args.chain.T + 1;
  const int64_t x_t = clamp_index(args.x_t[row], states(args.chain, K));
  PosteriorToken x;
  x.step =
      step_of(args.chain, clamp_index(args.t[b], T_levels), clamp_index(args.s[b], T_levels), x_t, K, args.marginal);
  x.x_t = x.step.masked ? kNoCode : (unsigned)x_t;
  // Of a certain token the logits are not read.
  x.logit_t = x.step.masked || x.step.certain ? -INFINITY : (double)widen(args.logits[row * K + x_t]) - x.step.shift;
  x.noise_t = x.step.masked ? 0 : x.step.spread * noise_of(args.chain, x_t, K);
  x.noise = args.chain.noise ? x.step.spread : x.step.spread / (double)K;
  return x;
}

// What the row tells of x_t, which is left out of the passes over it and put in by hand.
struct PredictedToken {
  double total;      // of the weights exp(logit - largest) of all codes
  double log_p, p;   // of x_t
  double predicted;  // its probability in x_s, noise and all
  double evidence;   // Z
};

__device__ inline PredictedToken predicted_token(const PosteriorToken &x, double largest, double others) {
  const double margin = x.logit_t - largest, weight = exp(margin);
  PredictedToken t;
  t.total = others + weight;
  t.log_p = margin - log(t.total);
  t.p = weight / t.total;
  t.predicted = x.step.signal * t.p + x.noise_t;
  t.evidence = x.step.move + x.step.stay * t.predicted;
  return t;
}

// log(exp(a) + exp(b)), of which either or both may be -infinity.
template <typename R>
__device__ __forceinline__ R log_add(R a, R b) {
  const bool first = a > b;
  const R high = first ? a : b, low = first ? b : a;
  return high == -INFINITY ? high : high + log1p(exp(low - high));
}

template <typename R>
struct PosteriorRow {
  R predicted;  // what makes a score less the largest the logarithm of what is predicted; NaN: no distribution
  R noise;      // logarithm of the token's `noise`
  R factor;     // logarithm of what multiplies the sum of the two
  R at_x_t;
};

template <typename R>
__device__ PosteriorRow<R> posterior_row(const PosteriorToken &x, double largest, double others) {
  const Step &step = x.step;
  const PredictedToken t = predicted_token(x, largest, others);
  const double log_flip = log(step.flip), log_evidence = log(t.evidence);
  PosteriorRow<R> row;
  row.predicted = (R)(log(step.signal) - log(t.total));
  row.noise = (R)log(x.noise);
  row.factor = (R)(log(step.move) - log_evidence + log_flip);
  row.at_x_t =
      (R)(log(step.stay + step.move) - log_evidence + log_flip + log_add(log(step.signal) + t.log_p, log(x.noise_t)));
  return row;
}

// log_p (rows, K), or (rows, K + 1) with a mask state.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxRowThreads, 1) posterior_rows(PosteriorArguments<T> args, T *log_p) {
  typedef accumulate_t<T> R;
  VQFAST_DYNAMIC_SHARED(memory);
  VQFAST_SHARED(R, partial, [32]);
  VQFAST_SHARED(PosteriorToken, shared_token, [1]);
  VQFAST_SHARED(PosteriorRow<R>, shared_row, [1]);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    __syncthreads();  // what is known of the previous row may still be read
    if (threadIdx.x == 0) shared_token[0] = posterior_token(args, row);
    __syncthreads();
    const PosteriorToken &x = shared_token[0];
    T *out = log_p + row * states(args.chain, args.K);
    if (threadIdx.x == 0 && args.chain.columns == 2)
      narrow((R)(x.step.masked ? log(1 - x.step.flip) : -INFINITY), out[args.K]);
    SoftmaxRow<T, V, AllCodes> scores({args.logits + row * args.K, nullptr, 0}, args.K,
                                      args.keep ? reinterpret_cast<R *>(memory) : nullptr);
    const bool is_owner = x.x_t != kNoCode && threadIdx.x == scores.owner((int)x.x_t);
    if (x.step.certain) {  // the logits may be anything
      fill_row<T, V>(out, args.K, -INFINITY);
      if (is_owner) narrow((R)0, out[x.x_t]);
      continue;
    }
    // The shift may take x_t far below all others: it has no part in the largest as it was.
    const OtherCodes others = {x.x_t, kNoCode};
    const R largest = Max()(block_reduce(scores.largest(others), Max(), partial), (R)x.logit_t);
    R weights = 0;
    scores.for_each_score([&](unsigned code, R score) {
      if (others(score, code)) weights += exp(score - largest);
    });
    weights = block_reduce(weights, Add(), partial);
    if (threadIdx.x == 0) shared_row[0] = posterior_row<R>(x, (double)largest, (double)weights);
    __syncthreads();
    const PosteriorRow<R> &found = shared_row[0];
    if (found.predicted != found.predicted) {
      fill_row<T, V>(out, args.K, (R)NAN);
      continue;
    }
    const double *noise = args.chain.noise;
    const bool noisy = x.noise > 0;
    scores.for_each_scores([&](unsigned first, const R(&values)[V]) {
      R result[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const R predicted = values[j] - largest + found.predicted;
        const R drawn = noise ? found.noise + log((R)noise[first + j]) : found.noise;
        result[j] = found.factor + (noisy ? log_add(predicted, drawn) : predicted);
      }
      store<T, V>(out + first, result);
    });
    if (is_owner) narrow(found.at_x_t, out[x.x_t]);
  }
}

template <typename R>
struct PosteriorGradient {
  R unit, signal;         // of a weight, its probability and what it is predicted with in x_s
  R noise;                // the token's `noise`
  double total;           // NaN: no distribution
  double p, share, seen;  // of x_t: p, signal p / (signal p + noise), stay signal p / Z
};

template <typename R>
__device__ PosteriorGradient<R> posterior_gradient(const PosteriorToken &x, double largest, double others) {
  const PredictedToken t = predicted_token(x, largest, others);
  const double signal = x.step.signal * t.p;
  PosteriorGradient<R> row;
  row.unit = (R)(1 / t.total);
  row.signal = (R)(x.step.signal / t.total);
  row.noise = (R)x.noise;
  row.total = t.total;
  row.p = t.p;
  row.share = x.noise_t > 0 ? signal / t.predicted : 1;
  row.seen = x.step.stay * signal / t.evidence;
  return row;
}

// grad (rows, K), or (rows, K + 1) with a mask state, whose probability no logit moves; grad_logits (rows, K).
template <typename T, int V>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    posterior_backward_rows(PosteriorArguments<T> args, const T *grad, T *grad_logits) {
  typedef accumulate_t<T> R;
  VQFAST_DYNAMIC_SHARED(memory);
  VQFAST_SHARED(R, partial, [32]);
  VQFAST_SHARED(double, partial_sums, [32]);
  VQFAST_SHARED(PosteriorToken, shared_token, [1]);
  VQFAST_SHARED(PosteriorGradient<R>, shared_row, [1]);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    __syncthreads();  // what is known of the previous row may still be read
    if (threadIdx.x == 0) shared_token[0] = posterior_token(args, row);
    __syncthreads();
    const PosteriorToken &x = shared_token[0];
    const T *given = grad + row * states(args.chain, args.K);
    T *out = grad_logits + row * args.K;
    if (x.step.certain) {
      fill_row<T, V>(out, args.K, 0);
      continue;
    }
    SoftmaxRow<T, V, OtherCodes> scores({args.logits + row * args.K, nullptr, 0}, args.K,
                                        args.keep ? reinterpret_cast<R *>(memory) : nullptr);
    const OtherCodes others = {x.x_t, kNoCode};
    const R largest = Max()(block_reduce(scores.largest(others), Max(), partial), (R)x.logit_t);
    scores.scale(largest, 1);
    const R weights = block_reduce(scores.weigh(others), Add(), partial);
    if (threadIdx.x == 0) shared_row[0] = posterior_gradient<R>(x, (double)largest, (double)weights);
    __syncthreads();
    const PosteriorGradient<R> &found = shared_row[0];
    if (found.total != found.total) {
      fill_row<T, V>(out, args.K, (R)NAN);
      continue;
    }
    const double *noise = args.chain.noise;
    const auto share = [&](R weight, unsigned code) {
      const R predicted = found.signal * weight, drawn = noise ? found.noise * (R)noise[code] : found.noise;
      return drawn > 0 ? predicted / (predicted + drawn) : (R)1;
    };
    // In float64: x_t's gradient is a small difference of what all codes' add up to.
    double sum = 0, moved = 0;
    scores.for_each([&](unsigned first, const R(&values)[V]) {
      R g[V];
      load<T, V>(given + first, g);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sum += (double)g[j];
        if (first + j != x.x_t) moved += (double)(g[j] * share(values[j], first + j));
      }
    });
    sum = block_reduce(sum, Add(), partial_sums);
    moved = block_reduce(moved, Add(), partial_sums);
    const bool is_code = x.x_t != kNoCode;
    const double moved_t = is_code ? (double)widen(given[x.x_t]) * found.share : 0, seen = sum * found.seen;
    const double pull = moved + moved_t - seen;
    scores.for_each([&](unsigned first, const R(&values)[V]) {
      R g[V];
      load<T, V>(given + first, g);
#pragma unroll
      for (int j = 0; j < V; ++j) g[j] = g[j] * share(values[j], first + j) - found.unit * values[j] * (R)pull;
      store<T, V>(out + first, g);
    });
    if (is_code && threadIdx.x == scores.owner((int)x.x_t)) narrow((R)(moved_t - found.p * pull - seen), out[x.x_t]);
  }
}

}  // namespace vqfast
