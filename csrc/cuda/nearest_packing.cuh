// Rows and codes rounded to bfloat16 for products by tensor cores, and the bound on what their scores are off by.
//
// Lines that round are marked with the name of their term in `tensor_error_bound`.
#pragma once

#include "nearest_candidates.cuh"

namespace vqfast {

// Maxima over the codes, as bits of floats, rounded up: ||c^||, ||v||, ||v - c^||. All zero at first.
struct TensorFacts {
  int rounded, exact, residual;
};

// Squared, of one vector: as packed, before it was rounded, of the difference.
struct TensorNorms {
  double rounded, exact, residual;
};
// value(d), d < D, and what follows it to bfloat16, by a warp. after(i), i >= 0, must be a bfloat16 value.
template <typename Value, typename After>
__device__ __forceinline__ TensorNorms pack_vector(const PackedVectors &to, int64_t i, int64_t D, Value value,
                                                   After after) {
  TensorNorms norms = {0, 0, 0};
  for (int d = threadIdx.x % 32; d < to.pitch; d += 32) {
    bf16 packed;
    if (d >= D) {
      narrow(after(d - (int)D), packed);
      to.at(i, d) = packed;
      continue;
    }
    const double v = value(d);
    narrow((float)v, packed);  // rounds: [inputs]
    to.at(i, d) = packed;
    const double back = (double)widen(packed), rest = v - back;
    norms.rounded += back * back;
    norms.exact += v * v;
    norms.residual += rest * rest;
  }
  return {warp_sum(norms.rounded), warp_sum(norms.exact), warp_sum(norms.residual)};
}

// Piece i of the three bfloat16 values that a float is the sum of.
__device__ __forceinline__ float bias_piece(float bias, int i) {
  for (int before = 0;; ++before) {
    bf16 piece;
    narrow(bias, piece);
    if (before == i || !is_finite(piece)) return before == i ? widen(piece) : 0;
    bias -= widen(piece);  // exact
  }
}

// A warp a code. bias: as in nearest_codes, which has written it; a code that is not finite is zeros and its bias.
template <typename T>
__global__ void nearest_tensor_codes(vqfast_metric metric, const T *codebook, int64_t D, int64_t padded_codes,
                                     CentredCodes codes, PackedVectors out, const SearchState *state,
                                     TensorFacts *facts) {
  const int64_t k = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (k >= padded_codes) return;
  const bool taken = codes.bias[k] != kNever;
  const double scale = scale_of<T>(state->code_size), factor = taken ? codes.factor(metric, k) : 0;
  const TensorNorms norms = pack_vector(
      out, k, D,
      [&](int d) { return taken ? centred_code(widen(codebook[k * D + d]), factor, codes.centre[d], scale) : 0; },
      [&](int i) { return out.with_bias && i < 3 ? bias_piece(codes.bias[k], i) : 0; });
  if (threadIdx.x % 32 != 0 || !taken) return;
  atomicMax(&facts->rounded, __float_as_int(rounded_up(sqrt(norms.rounded))));
  atomicMax(&facts->exact, __float_as_int(rounded_up(sqrt(norms.exact))));
  atomicMax(&facts->residual, __float_as_int(rounded_up(sqrt(norms.residual))));
}

// B(x): no score differs from its real value by more; the terms of kernels/nearest/README.md. Tensor cores may truncate
// where float32 rounds, and keep fewer bits while they align what they add: u is 2^-22 here. A bias in three pieces is
// three products more, in size together less than 1.01 times the bias.
__device__ inline double tensor_error_bound(vqfast_metric metric, int64_t D, const TensorNorms &row,
                                            const TensorFacts &facts, double unit_error) {
  constexpr double u = 0x1p-22;
  const double steps = (double)D + 24, gamma = steps * u / (1 - steps * u);
  const double x = sqrt(row.rounded), rest = sqrt(row.residual);
  const double rounded = __int_as_float(facts.rounded), exact = __int_as_float(facts.exact);
  const double residual = __int_as_float(facts.residual);
  if (!(x * rounded + exact * exact < 1e37)) return INFINITY;
  const double half_square = metric == VQFAST_L2 ? 0.505 * exact * exact : 0;
  const double sums = gamma * (x * rounded + half_square);  // [products], [bias], [sum]
  const double inputs = rest * exact + x * residual;        // [inputs]
  const double units = unit_error * (x + rest);             // [units]
  const double bound = (sums + inputs + units) * (1 + 1e-6) + 0x1p-118 * steps * (1 + x + exact);
  return bound < 1e37 ? bound : INFINITY;  // as a float its double is finite
}

// A warp a row of the n from `first` on. reach: how far below the best of its scores that of its nearest code can lie,
// rounded up; NaN where scores say nothing.
template <typename T>
__global__ void nearest_tensor_rows(vqfast_metric metric, int exact, Rows<T> x, int64_t first, int64_t n, int64_t D,
                                    CentredCodes codes, const SearchState *state, const TensorFacts *facts,
                                    PackedVectors out, float *reach) {
  const double scale = row_scale<T>(metric, *state);
  const int64_t warps = (int64_t)gridDim.x * (blockDim.x / 32);
  for (int64_t i = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i < n; i += warps) {
    const T *row = x.data + x.offset(first + i);
    const TensorNorms norms = pack_vector(
        out, i, D,
        [&](int d) { return ((double)widen(row[d * x.stride_feature]) - (double)codes.row_centre[d]) * scale; },
        [&](int i) { return out.with_bias && i < 3 ? 1.0f : 0; });
    if (threadIdx.x % 32 != 0) continue;
    const double bound = tensor_error_bound(metric, D, norms, *facts, __int_as_float(state->unit_error));
    reach[i] = !(bound < INFINITY) ? NAN : exact ? rounded_up(2 * bound) : 0;
  }
}

}  // namespace vqfast
