// The last word on a row that its scores leave open: the codes in question compared in float64, and those that float64
// cannot separate in twice float64. Compiled without contraction (exact_distance.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "binary_scale.h"
#include "convert.h"
#include "dispatch.h"
#include "exact_distance.h"
#include "nearest_codebook.h"

namespace vqfast {

// What a code is worth to a row, off by at most `slack`; the largest is the nearest.
struct Estimate {
  double worth, slack;
};

// One row, as float64 times a power of two, which keeps squares from overflowing.
struct ExactRow {
  const Codes &codes;
  double *wide;  // (D)

  ExactRow(const Codes &codes, const void *row, double *wide) : codes(codes), wide(wide) {
    // Distances need one scale for rows and codes; products and cosines only lose a factor that all codes share.
    const double scale = codes.metric == VQFAST_L2 ? codes.facts->scale : 0;
    codes.isa.widen_row(codes.dtype, row, codes.D, scale, wide);
  }

  double code_scale(int64_t k) const {
    if (codes.metric == VQFAST_L2) return codes.facts->scale;
    // Products and fourth powers of the narrower formats stay within float64.
    if (codes.dtype != VQFAST_F64) return 1;
    if (codes.metric == VQFAST_DOT) return scale_to_one(codes.facts->largest);
    double largest = 0;
    for (int64_t d = 0; d < codes.D; ++d) largest = std::max(largest, std::fabs(((const double *)codes.code(k))[d]));
    return scale_to_one(largest);
  }

  Estimate estimate(int64_t k) const {
    const double rounding = 0x1p-53 * ((double)codes.D + 9);
    if (codes.metric == VQFAST_L2) {
      const double distance = codes.isa.distance(codes.dtype, wide, codes.code(k), code_scale(k), codes.D);
      // Infinite distances tie.
      return {-distance, std::isfinite(distance) ? 2 * rounding * distance : 0};
    }
    const Products sums = codes.isa.products(codes.dtype, wide, codes.code(k), code_scale(k), codes.D);
    if (codes.metric == VQFAST_DOT) return {sums.product, 1.01 * rounding * sums.magnitude};
    if (sums.square == 0) return {0, 0};
    const double norm = std::sqrt(sums.square);
    return {sums.product / norm, 3 * rounding * sums.magnitude / norm};
  }

  Double2 worth(int64_t k) const {
    const double scale = code_scale(k);
    Double2 sum = {0, 0}, square = {0, 0};
    with_element(codes.dtype, [&](auto *type) {
      const auto *c = (decltype(type))codes.code(k);
      for (int64_t d = 0; d < codes.D; ++d) {
        const double value = scale * (double)widen(c[d]);
        if (codes.metric == VQFAST_L2) {
          sum = add_squared_difference(sum, wide[d], value);
        } else {
          sum = add_product(sum, wide[d], value);
          if (codes.metric == VQFAST_COSINE) square = add_product(square, value, value);
        }
      }
    });
    if (codes.metric == VQFAST_COSINE) return signed_square_cosine(sum, square);
    return codes.metric == VQFAST_L2 ? Double2{-sum.high, -sum.low} : sum;
  }
};

// The nearest of the codes found, which are in order: the lowest index among equals; 0 if there are none.
inline int64_t nearest_of(const Codes &codes, const void *row, const std::vector<int32_t> &found, double *wide,
                          std::vector<Estimate> &estimates) {
  const size_t n = found.size();
  if (n == 1) return found[0];
  const ExactRow exact(codes, row, wide);
  estimates.resize(n);
  double limit = -std::numeric_limits<double>::infinity();  // the nearest is worth at least this
  for (size_t i = 0; i < n; ++i) {
    estimates[i] = exact.estimate(found[i]);
    limit = std::max(limit, estimates[i].worth - estimates[i].slack);
  }
  const auto rival = [&](size_t i) { return estimates[i].worth + estimates[i].slack >= limit; };
  size_t first = 0, rivals = 0;
  for (size_t i = n; i-- > 0;)
    if (rival(i)) first = i, ++rivals;
  if (rivals == 0) return 0;
  int64_t winner = found[first];
  if (rivals == 1) return winner;

  const double slack = codes.metric == VQFAST_COSINE ? kEqualCosines : 0;
  Double2 most = exact.worth(winner);
  for (size_t i = first + 1; i < n; ++i) {
    if (!rival(i)) continue;
    const Double2 worth = exact.worth(found[i]);
    if (exceeds(worth, most, slack)) most = worth, winner = found[i];
  }
  return winner;
}

}  // namespace vqfast
