// Loss and reverse step of chains through matrices: a block takes a tile of rows from logits to the result. Softmax,
// product with the sample's matrix, posterior and draw, or posterior, divergence and the product back, all in float64
// and in shared memory. kernels/matrix_loss/README.md derives the formulas.
#pragma once

#include "launch.h"
#include "philox.h"
#include "truncate.cuh"

namespace vqfast {

template <typename T>
struct StepArguments {
  const T *logits;
  const int64_t *x_t, *s;
  vqfast_step step;
  int64_t B, L, tiles_a_sample;
  int K;
  bool marginal;
};

template <typename T>
struct MatrixLossArguments {
  StepArguments<T> step;
  const int64_t *x0;
  const double *scale;
  double aux_weight;
  accumulate_t<T> *loss;
  T *grad;  // or null
};

template <typename T>
struct MatrixSampleArguments {
  StepArguments<T> step;
  const T *unconditional;  // or null
  const int64_t *known;    // or null
  double factor, guidance;
  Truncation truncation;
  const int64_t *key;
  int64_t *x_s;
};

struct Lesser {
  __device__ __forceinline__ int operator()(int a, int b) const { return min(a, b); }
};
struct Greater {
  __device__ __forceinline__ int operator()(int a, int b) const { return max(a, b); }
};

template <typename R, typename Combine>
__device__ __forceinline__ R warp_reduce(R v, Combine combine) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) v = combine(v, __shfl_xor_sync(kFullWarp, v, step));
  return v;
}

struct WarpSum {
  template <typename R>
  __device__ __forceinline__ R operator()(R own) const {
    return warp_sum(own);
  }
};

// One token's scores in float64, guided, less their largest and over the temperature. A warp's lanes share them.
template <typename T>
struct WarpScores {
  typedef double R;
  const T *logits, *unconditional;  // unconditional: or null
  double guidance, factor, largest;
  int K;

  __device__ __forceinline__ double raw(int k) const {
    const double score = (double)widen(logits[k]);
    if (!unconditional) return score;
    const double other = (double)widen(unconditional[k]);
    // A code that either calls impossible stays so; infinities of one sign would make it NaN.
    return score == -INFINITY || other == -INFINITY ? -INFINITY : other + guidance * (score - other);
  }
  __device__ __forceinline__ double score(int k) const { return (raw(k) - largest) * factor; }
  __device__ __forceinline__ double weight_of(double score) const { return exp(score); }

  template <typename Body>
  __device__ __forceinline__ void for_each_score(Body body) const {
    for (int k = threadIdx.x % 32; k < K; k += 32) body((unsigned)k, score(k));
  }

  __device__ void find_largest() {
    double own = -INFINITY;
    for (int k = threadIdx.x % 32; k < K; k += 32) own = fmax(own, raw(k));
    largest = warp_reduce(own, Max());
  }

  // values[k pitch]: p(x_0 = k) up to a factor, or where `logs` its logarithm. By the marginal rule the values are
  // q(x_t | x_0 = k) before, which divides it; an x_0 that cannot have led to x_t has no weight.
  __device__ void predict(const Truncation &keep, bool marginal, bool logs, double *values, int pitch) const {
    LikelyCodes<double> likely;
    if (keep.any(K)) likely = Truncate(*this, K, 0.0, WarpSum())(keep);
    double top = 0;
    if (marginal) {
      top = -INFINITY;
      for (int k = threadIdx.x % 32; k < K; k += 32) {
        const double q = values[k * pitch], own = score(k);
        values[k * pitch] = q >= VQFAST_LEAST_EVIDENCE && likely.kept(own, (unsigned)k) ? own - log(q) : -INFINITY;
        top = fmax(top, values[k * pitch]);
      }
      top = warp_reduce(top, Max());
    }
    for (int k = threadIdx.x % 32; k < K; k += 32) {
      const double own = marginal ? values[k * pitch] - top : score(k);
      const double kept = marginal || likely.kept(own, (unsigned)k) ? own : -INFINITY;
      values[k * pitch] = logs ? kept : exp(kept);
    }
  }
};

// A tile of R rows, code by code; its first `count` rows are tokens, from `first` on.
template <int R>
struct StepTile {
  static constexpr int kPitch = step_pitch(R);
  double *before, *after;  // K kPitch numbers each: of the product, its operand and result
  int64_t first, sample;
  int count;
};

struct alignas(16) Two {
  double first, second;
};

// take(k, sums): code k of rows times matrix, of all rows of the tile. The threads share the codes.
template <int R, typename Take>
__device__ __forceinline__ void multiply(const double *rows, const double *matrix, int K, Take take) {
  constexpr int kPitch = StepTile<R>::kPitch;
  for (int first = threadIdx.x; first < K; first += kStepColumns * (int)kStepThreads) {
    const bool two = first + (int)kStepThreads < K;
    const double *column = matrix + first;
    double sums[kStepColumns][R] = {};
#pragma unroll 4
    for (int k = 0; k < K; ++k, column += K) {
      const double left = column[0], right = two ? column[kStepThreads] : 0;
      const Two *values = reinterpret_cast<const Two *>(rows + k * kPitch);
#pragma unroll
      for (int r = 0; r < R / 2; ++r) {
        const Two value = values[r];
        sums[0][2 * r] += value.first * left;
        sums[0][2 * r + 1] += value.second * left;
        sums[1][2 * r] += value.first * right;
        sums[1][2 * r + 1] += value.second * right;
      }
    }
    take(first, sums[0]);
    if (two) take(first + (int)kStepThreads, sums[1]);
  }
}

template <int R>
__device__ __forceinline__ void multiply(const double *rows, const double *matrix, int K, double *out) {
  multiply<R>(rows, matrix, K, [&](int k, const double (&sums)[R]) {
#pragma unroll
    for (int r = 0; r < R; ++r) out[k * StepTile<R>::kPitch + r] = sums[r];
  });
}

// Of a product of two numbers a code, neither less than 0: powers of two that keep it in range, however small its
// largest.
struct ProductScale {
  double first, second;
  int exponent;  // the product was multiplied by 2^-exponent

  __device__ __forceinline__ double operator()(double a, double b) const { return a * first * (b * second); }
};

__device__ __forceinline__ int exponent_of(double v) { return (int)(__double_as_longlong(v) >> 52 & 0x7ff) - 1022; }

// product(k): the pair of numbers. All lanes of the warp call it and get the same.
template <typename Factors>
__device__ ProductScale product_scale(int K, Factors factors) {
  int largest = -10000;
  for (int k = threadIdx.x % 32; k < K; k += 32) {
    const Two pair = factors(k);
    if (pair.first > 0 && pair.second > 0) largest = max(largest, exponent_of(pair.first) + exponent_of(pair.second));
  }
  largest = warp_reduce(largest, Greater());
  if (largest == -10000) largest = 0;
  const int half = max(largest / 2, -1000);
  return {ldexp(1.0, -half), ldexp(1.0, -max(largest - half, -1000)), half + max(largest - half, -1000)};
}

template <typename T>
__device__ __forceinline__ int64_t code_of(const StepArguments<T> &args, const int64_t *codes, int64_t row) {
  return clamp_index(codes[row], args.K);
}

// f: the likelihood of x_t for every x_s.
template <typename T>
__device__ __forceinline__ const double *likelihood_of(const StepArguments<T> &args, int64_t row) {
  return args.step.likelihood + row / args.L * args.step.stride_likelihood + code_of(args, args.x_t, row) * args.K;
}

// q(x_t | x_0) of a tile's rows for every x_0, where its operand belongs. Of rows that are not `wanted` nothing is
// read.
template <int R, typename T, typename Wanted>
__device__ void evidence(const StepArguments<T> &args, const StepTile<R> &tile, Wanted wanted) {
  for (int r = threadIdx.x / 32; r < R; r += kStepThreads / 32) {
    const double *f = r < tile.count && wanted(tile.first + r) ? likelihood_of(args, tile.first + r) : nullptr;
    for (int k = threadIdx.x % 32; k < args.K; k += 32) tile.after[k * tile.kPitch + r] = f ? f[k] : 0;
  }
  __syncthreads();
  multiply<R>(tile.after, args.step.transposed + tile.sample * args.step.stride_prior, args.K, tile.before);
  __syncthreads();
}

// body(tile) for every tile of this block.
template <int R, typename T, typename Body>
__device__ void for_each_tile(const StepArguments<T> &args, unsigned char *memory, Body body) {
  StepTile<R> tile;
  tile.before = reinterpret_cast<double *>(memory);
  tile.after = tile.before + (int64_t)args.K * tile.kPitch;
  for (int64_t i = blockIdx.x; i < args.B * args.tiles_a_sample; i += gridDim.x) {
    tile.sample = i / args.tiles_a_sample;
    const int64_t within = i % args.tiles_a_sample * R;
    tile.first = tile.sample * args.L + within;
    tile.count = (int)min(args.L - within, (int64_t)R);
    __syncthreads();  // the previous tile may still be read
    body(tile);
  }
}

// The first code whose cumulative weight exceeds the quantile of the total, in the order of the codes; the last code of
// any weight where rounding leaves none; `otherwise` where the weights are no distribution. weight(k) >= 0. All lanes
// of the warp call it and get the same.
template <typename Weight>
__device__ int64_t warp_draw(int K, double quantile, int64_t otherwise, Weight weight) {
  const int lane = threadIdx.x % 32;
  double total = 0;
  for (int first = 0; first < K; first += 32) total += warp_sum(first + lane < K ? weight(first + lane) : 0.0);
  if (!(total > 0)) return otherwise;
  const double target = quantile * total;
  double before = 0;
  int last = 0;
  for (int first = 0; first < K; first += 32) {
    const double own = first + lane < K ? weight(first + lane) : 0.0;
    double upto = own;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const double left = __shfl_up_sync(kFullWarp, upto, step);
      if (lane >= step) upto += left;
    }
    const int found = warp_reduce(own > 0 && before + upto > target ? first + lane : (int)kNoCode, Lesser());
    if (found != (int)kNoCode) return found;
    if (own > 0) last = first + lane;
    before += __shfl_sync(kFullWarp, upto, 31);
  }
  return warp_reduce(last, Greater());
}

template <typename T, int R>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks) matrix_sample_tiles(MatrixSampleArguments<T> args) {
  VQFAST_DYNAMIC_SHARED(memory);
  const StepArguments<T> &step = args.step;
  const int K = step.K, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto known_of = [&](int64_t row) { return args.known ? min(args.known[row], (int64_t)K - 1) : (int64_t)-1; };
  for_each_tile<R>(step, memory, [&](const StepTile<R> &tile) {
    constexpr int kPitch = StepTile<R>::kPitch;
    const double *prior = step.step.prior + tile.sample * step.step.stride_prior;
    const bool at_data = step.s[tile.sample] <= 0;
    const auto drawn = [&](int64_t row) { return known_of(row) < 0; };
    if (step.marginal) evidence<R>(step, tile, drawn);
    for (int r = warp; r < R; r += kStepThreads / 32) {
      const int64_t row = tile.first + r;
      if (r >= tile.count || !drawn(row)) {
        for (int k = lane; k < K; k += 32) tile.before[k * kPitch + r] = 0;
        continue;
      }
      WarpScores<T> scores = {step.logits + row * K,
                              args.unconditional ? args.unconditional + row * K : nullptr,
                              args.guidance,
                              args.factor,
                              0,
                              K};
      scores.find_largest();
      scores.predict(args.truncation, step.marginal, at_data, tile.before + r, kPitch);
    }
    __syncthreads();
    if (!at_data) {
      multiply<R>(tile.before, prior, K, tile.after);
      __syncthreads();
    }
    for (int r = warp; r < tile.count; r += kStepThreads / 32) {
      const int64_t row = tile.first + r, known = known_of(row), x_t = code_of(step, step.x_t, row);
      const double quantile = uniform(philox((uint64_t)args.key[0], (uint64_t)args.key[1], (uint64_t)row, 0).first);
      const double *f = likelihood_of(step, row), *model = (at_data ? tile.before : tile.after) + r;
      int64_t x_s;
      if (known >= 0) {
        x_s = warp_draw(K, quantile, known, [&](int k) { return prior[known * K + k]; });
      } else if (at_data) {
        double top = -INFINITY;
        for (int k = lane; k < K; k += 32) top = fmax(top, log(f[k]) + model[k * kPitch]);
        top = warp_reduce(top, Max());
        x_s = warp_draw(K, quantile, x_t, [&](int k) { return exp(log(f[k]) + model[k * kPitch] - top); });
      } else {
        const ProductScale scale = product_scale(K, [&](int k) { return Two{f[k], model[k * kPitch]}; });
        x_s = warp_draw(K, quantile, x_t, [&](int k) { return scale(f[k], model[k * kPitch]); });
      }
      if (lane == 0) args.x_s[row] = x_s;
    }
  });
}

// KL of a token at a level above the data; model, a code's number kPitch after the one before, becomes dKL / dmodel.
// All lanes of the warp call it and get the same.
template <int kPitch>
__device__ double diverge(const double *f, const double *truth, double *model, int K) {
  const int lane = threadIdx.x % 32;
  const ProductScale scale_a = product_scale(K, [&](int k) { return Two{f[k], truth[k]}; });
  const ProductScale scale_b = product_scale(K, [&](int k) { return Two{f[k], model[k * kPitch]}; });
  double sum_a = 0, sum_b = 0;
  for (int k = lane; k < K; k += 32) {
    sum_a += scale_a(f[k], truth[k]);
    sum_b += scale_b(f[k], model[k * kPitch]);
  }
  sum_a = warp_sum(sum_a);
  sum_b = warp_sum(sum_b);
  double mean = 0;
  for (int k = lane; k < K; k += 32) {
    const double m = model[k * kPitch], a = scale_a(f[k], truth[k]) / sum_a, b = scale_b(f[k], m) / sum_b;
    // 0 log 0 = 0. A pair of x_0 and x_t that the chain cannot give is NaN, and stays it.
    if (a != 0) mean += a * (log(truth[k]) - log(m));
    model[k * kPitch] = m == 0 ? 0 : (b - a) / m;
  }
  // The scales are powers of two: their logarithms beside those of the sums.
  return warp_sum(mean) + ((log(sum_b) - log(sum_a)) + (scale_b.exponent - scale_a.exponent) * 0x1.62e42fefa39efp-1);
}

// The same at the data, where the model is given by its logarithm and the truth is x_0; it becomes dKL / dlogarithm.
template <int kPitch>
__device__ double diverge_at_data(const double *f, int64_t x0, double *model, int K) {
  const int lane = threadIdx.x % 32;
  double top = -INFINITY;
  for (int k = lane; k < K; k += 32) top = fmax(top, log(f[k]) + model[k * kPitch]);
  top = warp_reduce(top, Max());
  double sum = 0;
  for (int k = lane; k < K; k += 32) sum += exp(log(f[k]) + model[k * kPitch] - top);
  sum = warp_sum(sum);
  // NaN where x_0 cannot have led to x_t.
  const double one = f[x0] / f[x0], lost = (top + log(sum)) - (log(f[x0]) + model[x0 * kPitch]);
  __syncwarp();
  for (int k = lane; k < K; k += 32)
    model[k * kPitch] = exp(log(f[k]) + model[k * kPitch] - top) / sum - (k == x0 ? one : one - one);
  return one * lost;
}

// What the auxiliary term needs of a token's scores.
struct Auxiliary {
  double largest, total;
};

template <typename T, int R>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks) matrix_loss_tiles(MatrixLossArguments<T> args) {
  VQFAST_DYNAMIC_SHARED(memory);
  VQFAST_SHARED(Auxiliary, auxiliary, [R]);
  const StepArguments<T> &step = args.step;
  const int K = step.K, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for_each_tile<R>(step, memory, [&](const StepTile<R> &tile) {
    constexpr int kPitch = StepTile<R>::kPitch;
    const double *prior = step.step.prior + tile.sample * step.step.stride_prior;
    const bool at_data = step.s[tile.sample] <= 0;
    const auto counts = [&](int64_t row) { return args.scale[row] != 0; };
    if (step.marginal) evidence<R>(step, tile, counts);
    for (int r = warp; r < R; r += kStepThreads / 32) {
      const int64_t row = tile.first + r;
      if (r >= tile.count || !counts(row)) {
        for (int k = lane; k < K; k += 32) tile.before[k * kPitch + r] = 0;
        continue;
      }
      WarpScores<T> scores = {step.logits + row * K, nullptr, 1, 1, 0, K};
      scores.find_largest();
      if (args.aux_weight != 0) {
        double total = 0;
        scores.for_each_score([&](unsigned, double score) { total += exp(score); });
        total = warp_sum(total);
        if (lane == 0) auxiliary[r] = {scores.largest, total};
      }
      scores.predict({0, 1}, step.marginal, at_data, tile.before + r, kPitch);
    }
    __syncthreads();
    if (!at_data) {
      multiply<R>(tile.before, prior, K, tile.after);
      __syncthreads();
    }
    // At the data the model's logarithms stay where they are, and so does their gradient.
    double *model = at_data ? tile.before : tile.after;
    for (int r = warp; r < R; r += kStepThreads / 32) {
      const int64_t row = tile.first + r;
      if (r >= tile.count || !counts(row)) {
        for (int k = lane; k < K; k += 32) model[k * kPitch + r] = 0;
        if (r < tile.count && lane == 0) args.loss[row] = 0;
        continue;
      }
      const int64_t x0 = code_of(step, args.x0, row);
      const double *f = likelihood_of(step, row);
      double loss =
          at_data ? diverge_at_data<kPitch>(f, x0, model + r, K) : diverge<kPitch>(f, prior + x0 * K, model + r, K);
      if (args.aux_weight != 0) {
        const double margin = (double)widen(step.logits[row * K + x0]) - auxiliary[r].largest;
        loss -= args.aux_weight * (margin - log(auxiliary[r].total));
      }
      if (lane == 0) args.loss[row] = (accumulate_t<T>)loss;
    }
    if (!args.grad) return;
    __syncthreads();
    const auto write = [&](int r, int k, double gradient) {
      const int64_t row = tile.first + r;
      double own = 0;
      if (counts(row)) {
        own = gradient;
        if (args.aux_weight != 0) {
          const double score = (double)widen(step.logits[row * K + k]) - auxiliary[r].largest;
          const double here = k == code_of(step, args.x0, row) ? 1 : 0;
          own += args.aux_weight * (exp(score) / auxiliary[r].total - here);
        }
        own *= args.scale[row];
      }
      narrow((accumulate_t<T>)own, args.grad[row * K + k]);
    };
    if (at_data) {
      for (int k = threadIdx.x; k < K; k += kStepThreads)
        for (int r = 0; r < tile.count; ++r) write(r, k, model[k * kPitch + r]);
      return;
    }
    multiply<R>(tile.after, step.step.transposed + tile.sample * step.step.stride_prior, K,
                [&](int k, const double (&sums)[R]) {
                  for (int r = 0; r < R; ++r)
                    if (r < tile.count) write(r, k, tile.before[k * kPitch + r] * sums[r]);
                });
  });
}

}  // namespace vqfast
