// top-k and top-p without a sort: the least score that is kept is found by bisection over the bits of a float, each
// step one pass over the row and one sum over the threads that share it.
#pragma once

#include "softmax_row.cuh"

namespace vqfast {

// Integers in the order of the floats whose bits they are; each other's inverse.
__device__ __forceinline__ int32_t in_order(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }
__device__ __forceinline__ int64_t in_order(int64_t bits) { return bits ^ (bits >> 63 & 0x7fffffffffffffff); }
__device__ __forceinline__ int32_t key_of(float v) { return in_order(__float_as_int(v)); }
__device__ __forceinline__ int64_t key_of(double v) { return in_order((int64_t)__double_as_longlong(v)); }
__device__ __forceinline__ float value_of(int32_t key) { return __int_as_float(in_order(key)); }
__device__ __forceinline__ double value_of(int64_t key) { return __longlong_as_double(in_order(key)); }

// The largest integer of low..high that holds; low does, and all below one that does.
template <typename Key, typename Holds>
__device__ Key largest_that(Key low, Key high, Holds holds) {
  while (low < high) {
    const Key middle = (low | high) - ((low ^ high) >> 1);  // their mean, rounded up, with no overflow
    if (holds(middle))
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// The codes that a truncated draw may take: those of a larger score than `least`, and of equal scores those up to the
// code `last`. NaN is kept, so that its row shows. `without` weighs nothing.
template <typename R>
struct LikelyCodes {
  R least = -INFINITY;
  unsigned last = kNoCode, without = kNoCode;

  __device__ __forceinline__ bool kept(R score, unsigned code) const {
    return !(score < least) && !(score == least && code > last);
  }
  __device__ __forceinline__ bool operator()(R score, unsigned code) const {
    return code != without && kept(score, code);
  }
};

// How far a draw is truncated: the top_k largest scores (0: all), of these the smallest set of the largest whose share
// is at least top_p (1: all).
struct Truncation {
  int64_t top_k;
  double top_p;

  __host__ __device__ bool any(int64_t K) const { return (top_k > 0 && top_k < K) || top_p < 1; }
};

// Of one value of every thread of the block.
template <typename R>
struct BlockSum {
  R *partial;
  int *counts;
  __device__ R operator()(R own) const { return block_reduce(own, Add(), partial); }
  __device__ int operator()(int own) const { return block_reduce(own, Add(), counts); }
};

// Row: R, for_each_score(body(code, score)) of this thread's part, and weight_of(score). Sum: of one value of every
// thread that has a part.
template <typename Row, typename Sum>
class Truncate {
 public:
  typedef typename Row::R R;

  __device__ Truncate(const Row &row, int K, R largest, const Sum &sum)
      : row_(row), K_(K), largest_(largest), sum_(sum) {}

  // Every thread that has a part calls it and gets the same.
  __device__ LikelyCodes<R> operator()(const Truncation &keep) const {
    LikelyCodes<R> likely;
    if (keep.top_k > 0 && keep.top_k < K_) {
      const R least =
          threshold([&](R v) { return count([=](R score, unsigned) { return score >= v; }) >= keep.top_k; });
      const int above = count([=](R score, unsigned) { return score > least; });
      likely.least = least;
      likely.last = last_of(likely, (double)(keep.top_k - above));
    }
    if (keep.top_p < 1) {
      const double enough = keep.top_p * (double)mass(likely, [](R) { return true; });
      const R least = threshold([&](R v) { return mass(likely, [=](R score) { return score >= v; }) >= enough; });
      const double above = mass(likely, [=](R score) { return score > least; });
      const unsigned before = likely.least == least ? likely.last : kNoCode;
      likely.least = least;
      likely.last = min(before, last_of(likely, ceil((enough - above) / (double)row_.weight_of(least))));
    }
    return likely;
  }

 private:
  template <typename Holds>
  __device__ R threshold(Holds holds) const {
    return value_of(
        largest_that(key_of((R)-INFINITY), key_of(largest_), [&](auto key) { return holds(value_of(key)); }));
  }

  // The code of the nth of the scores equal to the threshold; none where there are no more than n, or they weigh
  // nothing.
  __device__ unsigned last_of(const LikelyCodes<R> &likely, double n) const {
    const R least = likely.least;
    if (least == -INFINITY || count([=](R score, unsigned) { return score == least; }) <= n) return kNoCode;
    return (unsigned)largest_that(0, K_ - 1, [&](int code) {
      return count([=](R score, unsigned k) { return score == least && (int)k < code; }) < n;
    });
  }

  template <typename Counts>
  __device__ int count(Counts counts) const {
    int own = 0;
    row_.for_each_score([&](unsigned code, R score) { own += counts(score, code); });
    return sum_(own);
  }

  template <typename Weighs>
  __device__ R mass(const LikelyCodes<R> &likely, Weighs weighs) const {
    R own = 0;
    row_.for_each_score([&](unsigned code, R score) {
      if (weighs(score) && likely.kept(score, code)) own += row_.weight_of(score);
    });
    return sum_(own);
  }

  const Row &row_;
  int K_;
  R largest_;
  Sum sum_;
};

}  // namespace vqfast
