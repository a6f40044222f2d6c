// Rows of K float64 numbers times a (K, K) matrix, and the passes before and after. `n` is K rounded up to whole
// panels; scores behind K are -infinity and weights behind it 0.
#pragma once

#include "dispatch.h"
#include "simd_double.h"

namespace vqfast::VQFAST_ISA {

constexpr int kMatrixRows = kLanes == 16 ? 12 : 6;  // of a tile: its sums stay in registers
constexpr int kMatrixPanel = 2 * kDoubles;          // columns of a panel

// Panels first..end-1: panel i holds columns i kMatrixPanel and on of the matrix, or of its transpose, row by row.
static void pack_matrix(const double *matrix, int64_t K, bool transpose, int64_t first, int64_t end, double *panels) {
  const int64_t by_row = transpose ? 1 : K, by_column = transpose ? K : 1;
  for (int64_t i = first; i < end; ++i) {
    double *panel = panels + i * kMatrixPanel * K;
    const double *columns = matrix + i * kMatrixPanel * by_column;
    const int64_t left = K - i * kMatrixPanel, width = left < kMatrixPanel ? left : kMatrixPanel;
    for (int64_t k = 0; k < K; ++k)
      for (int j = 0; j < kMatrixPanel; ++j)
        panel[k * kMatrixPanel + j] = j < width ? columns[k * by_row + j * by_column] : 0;
  }
}

// out = rows matrix, of kMatrixRows rows, each n numbers after the one before. tile: scratch for kMatrixRows K numbers.
static void multiply_rows(const double *rows, const double *panels, int64_t K, int64_t n, double *tile, double *out) {
  for (int64_t k = 0; k < K; ++k)
    for (int r = 0; r < kMatrixRows; ++r) tile[k * kMatrixRows + r] = rows[r * n + k];
  for (int64_t first = 0; first < n; first += kMatrixPanel, panels += kMatrixPanel * K) {
    vd sums[kMatrixRows][2] = {};
    const double *values = tile, *panel = panels;
    for (int64_t k = 0; k < K; ++k, values += kMatrixRows, panel += kMatrixPanel) {
      const vd left = load(panel), right = load(panel + kDoubles);
#pragma GCC unroll 12
      for (int r = 0; r < kMatrixRows; ++r) {
        const vd value = splat(values[r]);
        sums[r][0] += value * left;
        sums[r][1] += value * right;
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kMatrixRows; ++r) {
      store(out + r * n + first, sums[r][0]);
      store(out + r * n + first + kDoubles, sums[r][1]);
    }
  }
}

static double largest_of(vd v) {
  double lane[kDoubles], largest = -__builtin_inf();
  store(lane, v);
  for (int i = 0; i < kDoubles; ++i) largest = lane[i] > largest ? lane[i] : largest;
  return largest;
}

// The numbers of a row from k on, 0 behind K.
static inline __attribute__((always_inline)) vd load_up_to(const double *row, int64_t k, int64_t K) {
  return k + kDoubles <= K ? load(row + k) : load_part(row + k, k < K ? (int)(K - k) : 0);
}

// Widens a row of logits and returns the largest; NaN is passed over.
static double load_wide_scores(vqfast_dtype dtype, const void *row, int64_t K, int64_t n, double *scores) {
  with_element(dtype, [&](auto *type) {
    const auto *logits = (decltype(type))row;
    int64_t k = 0;
    for (; k + kLanes <= K; k += kLanes) {
      vd parts[2];
      load_doubles(logits + k, parts);
      store(scores + k, parts[0]);
      store(scores + k + kDoubles, parts[1]);
    }
    for (; k < K; ++k) scores[k] = (double)widen(logits[k]);
  });
  for (int64_t k = K; k < n; ++k) scores[k] = -__builtin_inf();
  vd most = splat(-__builtin_inf());
  for (int64_t k = 0; k < n; k += kDoubles) most = max(load(scores + k), most);
  return largest_of(most);
}

// weights = exp((scores - largest) factor). Returns their sum; sums[i] is that of codes i kBlockCodes and on.
static double exp_wide_scores(const double *scores, int64_t n, double largest, double factor, double *weights,
                              double *sums) {
  const vd top = splat(largest), by = splat(factor);
  double total = 0;
  for (int64_t first = 0; first < n; first += kBlockCodes) {
    const int64_t end = first + kBlockCodes < n ? first + kBlockCodes : n;
    vd block = {};
    for (int64_t k = first; k < end; k += kDoubles) {
      const vd weight = exp((load(scores + k) - top) * by);
      store(weights + k, weight);
      block += weight;
    }
    total += *sums++ = sum(block);
  }
  return total;
}

// scores -= log q, -infinity where that is too small. Returns the largest; NaN is passed over.
static double subtract_logs(double *scores, const double *q, int64_t n) {
  const vd never = splat(-__builtin_inf());
  vd most = never;
  for (int64_t k = 0; k < n; k += kDoubles) {
    const vd given = load(q + k), score = load(scores + k) - log(given);
    const vd kept = given < splat(VQFAST_LEAST_EVIDENCE) ? never : score;
    store(scores + k, kept);
    most = max(kept, most);
  }
  return largest_of(most);
}

// Weights of x_s, up to a factor: f times the model's row, which is given by its logarithm where `logs`. Returns their
// sum; sums[i] is that of codes i kBlockCodes and on.
static double weigh_posterior(const double *f, const double *model, bool logs, int64_t K, int64_t n, double *weights,
                              double *sums) {
  vd most = splat(-__builtin_inf());
  for (int64_t k = 0; k < n; k += kDoubles) {
    const vd m = load(model + k), score = log(load_up_to(f, k, K)) + (logs ? m : log(m));
    store(weights + k, score);
    most = max(score, most);
  }
  return exp_wide_scores(weights, n, largest_of(most), 1, weights, sums);
}

// KL of f true from f model, both normalised. model, by its logarithm where `logs`, becomes dKL / dmodel, or dKL /
// dlogarithm. first, second, ratio: scratch for n numbers each.
static double diverge(const double *f, const double *truth, double *model, bool logs, int64_t K, int64_t n,
                      double *first, double *second, double *ratio) {
  const vd never = splat(-__builtin_inf());
  vd most_a = never, most_b = never;
  for (int64_t k = 0; k < n; k += kDoubles) {
    const vd m = load(model + k), log_m = logs ? m : log(m);
    const vd log_f = log(load_up_to(f, k, K)), log_u = log(load_up_to(truth, k, K));
    const vd a = log_f + log_u, b = log_f + log_m;
    store(first + k, a);
    store(second + k, b);
    store(ratio + k, log_u - log_m);
    most_a = max(a, most_a);
    most_b = max(b, most_b);
  }
  const double top_a = largest_of(most_a), top_b = largest_of(most_b);
  vd total_a = {}, total_b = {};
  for (int64_t k = 0; k < n; k += kDoubles) {
    const vd a = exp(load(first + k) - splat(top_a)), b = exp(load(second + k) - splat(top_b));
    store(first + k, a);
    store(second + k, b);
    total_a += a;
    total_b += b;
  }
  const double sum_a = sum(total_a), sum_b = sum(total_b);
  const vd per_a = splat(1 / sum_a), per_b = splat(1 / sum_b);
  vd mean = {};
  for (int64_t k = 0; k < n; k += kDoubles) {
    const vd a = load(first + k) * per_a, b = load(second + k) * per_b, m = load(model + k);
    mean += a == (vd){} ? (vd){} : a * load(ratio + k);
    const vd slope = b - a;
    store(model + k, logs ? slope : m == (vd){} ? (vd){} : slope / m);
  }
  // log(sum) of numbers whose largest is 1, and the two tops beside it.
  const vd logs_of_sums = log((vd){sum_a, sum_b});
  return sum(mean) + ((top_b - top_a) + (logs_of_sums[1] - logs_of_sums[0]));
}

}  // namespace vqfast::VQFAST_ISA
