// Single vectors of D elements against a code: squared error, gradient, weighted sum.
#pragma once

#include "dispatch.h"
#include "simd_elements.h"

namespace vqfast::VQFAST_ISA {

template <class T>
static double squared_error_of(const T *x, const T *code, int64_t D) {
  typename Wide<T>::vector even = {}, odd = {};
  int64_t d = 0;
  for (; d + 2 * kWidth<T> <= D; d += 2 * kWidth<T>) {
    const auto a = load(x + d) - load(code + d), b = load(x + d + kWidth<T>) - load(code + d + kWidth<T>);
    even += a * a;
    odd += b * b;
  }
  for (; d + kWidth<T> <= D; d += kWidth<T>) {
    const auto a = load(x + d) - load(code + d);
    even += a * a;
  }
  if (d < D) {
    const auto a = load_part(x + d, D - d) - load_part(code + d, D - d);
    odd += a * a;
  }
  return sum(even + odd);
}

// ||x - code||^2, accumulated in float32 (float64 for float64).
static double squared_error(vqfast_dtype dtype, const void *x, const void *code, int64_t D) {
  double error = 0;
  with_element(dtype, [&](auto *type) { error = squared_error_of((decltype(type))x, (decltype(type))code, D); });
  return error;
}

// The sum over a square, row by row, of what read(vector) gives.
template <class T, class Read>
static inline __attribute__((always_inline)) auto sum_of_square(const Square &square, Read read) {
  const T *first = (const T *)square.first;
  auto sum = read(first);
  for (int64_t y = 0; y < square.edge; ++y)
    for (int64_t x = !y; x < square.edge; ++x) sum += read(first + y * square.row + x * square.column);
  return sum;
}

template <class T>
static void lookup_grad_of(const Square &grad, typename Wide<T>::scalar slope, const T *x, const T *code, int64_t D,
                           void *out_row) {
  T *out = (T *)out_row;
  const auto factor = splat(slope);
  int64_t d = 0;
  for (; d + kWidth<T> <= D; d += kWidth<T>) {
    const auto through = sum_of_square<T>(grad, [=](const T *v) { return load(v + d); });
    store(out + d, through + factor * (load(x + d) - load(code + d)));
  }
  if (const int n = D - d) {
    const auto through = sum_of_square<T>(grad, [=](const T *v) { return load_part(v + d, n); });
    store_part(out + d, through + factor * (load_part(x + d, n) - load_part(code + d, n)), n);
  }
}

// out = sum of grad + slope (x - code).
static void lookup_grad(vqfast_dtype dtype, const Square &grad, double slope, const void *x, const void *code,
                        int64_t D, void *out) {
  with_element(dtype, [&](auto *type) {
    typedef decltype(type) Row;
    lookup_grad_of(grad, slope, (Row)x, (Row)code, D, out);
  });
}

template <class T>
static void sum_square_of(const T *, const Square &vectors, int64_t D, void *sum_row) {
  T *sum = (T *)sum_row;
  int64_t d = 0;
  for (; d + kWidth<T> <= D; d += kWidth<T>)
    store(sum + d, sum_of_square<T>(vectors, [=](const T *v) { return load(v + d); }));
  if (const int n = D - d)
    store_part(sum + d, sum_of_square<T>(vectors, [=](const T *v) { return load_part(v + d, n); }), n);
}

// sum = that of the vectors, row by row, rounded once.
static void sum_square(vqfast_dtype dtype, const Square &vectors, int64_t D, void *sum) {
  with_element(dtype, [&](auto *type) { sum_square_of(type, vectors, D, sum); });
}

template <class T>
static void move_residual_of(const T *code, int64_t D, void *rest_row, void *total_row) {
  T *rest = (T *)rest_row, *total = (T *)total_row;
  int64_t d = 0;
  for (; d + kWidth<T> <= D; d += kWidth<T>) {
    const auto moved = load(code + d);
    store(rest + d, load(rest + d) - moved);
    store(total + d, load(total + d) + moved);
  }
  if (const int n = D - d) {
    const auto moved = load_part(code + d, n);
    store_part(rest + d, load_part(rest + d, n) - moved, n);
    store_part(total + d, load_part(total + d, n) + moved, n);
  }
}

// rest -= code and total += code, each rounded to the dtype.
static void move_residual(vqfast_dtype dtype, const void *code, int64_t D, void *rest, void *total) {
  with_element(dtype, [&](auto *type) { move_residual_of((decltype(type))code, D, rest, total); });
}

// Features d..d + kVectors kLanes - 1, their sums in registers.
template <int kVectors, class T>
static inline void add_columns(const void *const *rows, const double *weights, int64_t n, int64_t d, double *sums) {
  vd total[kVectors][2];
  for (int v = 0; v < kVectors; ++v) load_doubles(sums + d + v * kLanes, total[v]);
  for (int64_t i = 0; i < n; ++i) {
    const T *x = (const T *)rows[i] + d;
    const vd weight = splat(weights[i]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      vd value[2];
      load_doubles(x + v * kLanes, value);
      total[v][0] += weight * value[0];
      total[v][1] += weight * value[1];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store(sums + d + v * kLanes, total[v][0]);
    store(sums + d + v * kLanes + kLanes / 2, total[v][1]);
  }
}

template <class T>
static void add_rows_of(const T *, const void *const *rows, const double *weights, int64_t n, int64_t D, double *sums) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= D; d += 4 * kLanes) add_columns<4, T>(rows, weights, n, d, sums);
  for (; d + kLanes <= D; d += kLanes) add_columns<1, T>(rows, weights, n, d, sums);
  for (; d < D; ++d)
    for (int64_t i = 0; i < n; ++i) sums[d] += weights[i] * widen(((const T *)rows[i])[d]);
}

// sums[d] += sum over i of weights[i] rows[i][d], in float64 and in that order.
static void add_rows(vqfast_dtype dtype, const void *const *rows, const double *weights, int64_t n, int64_t D,
                     double *sums) {
  with_element(dtype, [&](auto *type) { add_rows_of(type, rows, weights, n, D, sums); });
}

}  // namespace vqfast::VQFAST_ISA
