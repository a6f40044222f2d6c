// top-k and top-p without a sort: the least score that is kept is found by bisection over the bits of a float.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "score_passes.h"

namespace vqfast {

// top_k: how many of the largest are kept, 0 for all. top_p: then the smallest set of the largest with this share.
struct Truncation {
  int64_t top_k;
  double top_p;

  bool any(int64_t K) const { return (top_k > 0 && top_k < K) || top_p < 1; }
};

// A float as an integer of the same order.
template <class Real>
class Ordered {
 public:
  typedef std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t> Key;
  static Key key(Real value) {
    Key bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & kSign ? ~bits : bits | kSign;
  }
  static Real value(Key key) {
    const Key bits = key & kSign ? key ^ kSign : ~key;
    Real value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

 private:
  static constexpr Key kSign = (Key)1 << (8 * sizeof(Real) - 1);
};

// Subnormal numbers compare as 0 while they are flushed: thresholds are 0 or normal.
template <class Real>
Real normal_or_zero(Real value) {
  return std::abs(value) < std::numeric_limits<Real>::min() ? 0 : value;
}

// The next larger of these.
template <class Real>
Real above(Real threshold) {
  constexpr Real kLeast = std::numeric_limits<Real>::min();
  if (threshold == 0) return kLeast;
  return threshold == -kLeast ? 0 : std::nextafter(threshold, std::numeric_limits<Real>::infinity());
}

// The largest threshold that `holds`; it holds for -infinity, and below any threshold for which it holds.
template <class Real, class Holds>
Real largest_threshold(Real most, Holds holds) {
  typedef Ordered<Real> Order;
  auto low = Order::key(-std::numeric_limits<Real>::infinity()), high = Order::key(most);
  while (low < high) {
    const auto middle = low + (high - low) / 2 + (high - low) % 2;
    if (holds(Order::value(middle)))
      low = middle;
    else
      high = middle - 1;
  }
  return normal_or_zero(Order::value(low));
}

// Drops what is below the threshold, and of what equals it all that `more`, asked in the order of the codes, refuses.
template <class Passes, class Real, class More>
double keep_above(const Passes &passes, int64_t K, Real threshold, More more, Real *scores, Real *weights,
                  double *sums) {
  passes.keep(scores, weights, passes.padded(K), threshold);
  for (int64_t k = 0; k < K; ++k) {
    if (scores[k] != threshold || more(weights[k])) continue;
    scores[k] = -std::numeric_limits<Real>::infinity();
    weights[k] = 0;
  }
  return passes.sum(weights, passes.padded(K), sums);
}

// Sets the weights of the codes that are not kept to 0. Returns the sum of the others, by blocks in `sums`.
template <class Passes, class Real>
double truncate(const Passes &passes, const Truncation &keep, int64_t K, Real *scores, Real *weights, double *sums,
                double total) {
  const int64_t padded = passes.padded(K);
  constexpr Real kNever = -std::numeric_limits<Real>::infinity();
  const Real largest = *std::max_element(scores, scores + K);
  if (keep.top_k > 0 && keep.top_k < K) {
    const Real least =
        largest_threshold(largest, [&](Real v) { return passes.count(scores, padded, v) >= keep.top_k; });
    if (least != kNever) {
      int64_t left = keep.top_k - passes.count(scores, padded, above(least));
      total = keep_above(passes, K, least, [&](Real) { return left-- > 0; }, scores, weights, sums);
    }
  }
  if (keep.top_p < 1) {
    const double enough = keep.top_p * total;
    const Real least =
        largest_threshold(largest, [&](Real v) { return passes.mass(scores, weights, padded, v) >= enough; });
    if (least != kNever) {
      double mass = passes.mass(scores, weights, padded, above(least));
      const auto more = [&](Real weight) {
        const bool short_of = mass < enough;
        mass += weight;
        return short_of;
      };
      total = keep_above(passes, K, least, more, scores, weights, sums);
    }
  }
  return total;
}

}  // namespace vqfast
