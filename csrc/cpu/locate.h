// A draw from weights whose sums by blocks of codes are known.
#pragma once

#include <algorithm>

#include "dispatch.h"

namespace vqfast {

// The first code whose cumulative weight exceeds the target; the last that has any weight if rounding leaves none.
// sums[i]: of the codes i kBlockCodes and on.
template <class Real>
int64_t locate(const Real *weights, const double *sums, int64_t K, double target) {
  const int64_t blocks = (K + kBlockCodes - 1) / kBlockCodes;
  double before = 0, before_chosen = 0;
  int64_t chosen = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    if (sums[i] > 0) chosen = i, before_chosen = before;
    before += sums[i];
    if (before > target) break;
  }
  const int64_t first = chosen * kBlockCodes, end = std::min(first + kBlockCodes, K);
  int64_t drawn = first;
  double cumulative = before_chosen;
  for (int64_t k = first; k < end; ++k) {
    if (!(weights[k] > 0)) continue;
    drawn = k;
    cumulative += weights[k];
    if (cumulative > target) break;
  }
  return drawn;
}

}  // namespace vqfast
