// What a transition family does to a token in a step from t to s < t. kernels/posterior/README.md derives the formulas.
#pragma once

#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "philox.h"
#include "vqfast.h"

namespace vqfast {

// Of a clean token at some level: still itself, replaced by another code, in the mask state.
struct Shares {
  double kept, replaced, masked;

  Shares(const vqfast_levels &chain, int64_t level)
      : kept(chain.levels[level * chain.columns]),
        replaced(0),
        masked(chain.columns == 2 ? chain.levels[level * 2 + 1] : 0) {
    replaced = std::max((1 - kept) - masked, 0.0);
  }
};

inline double noise_of(const vqfast_levels &chain, int64_t code, int64_t K) {
  return chain.noise ? chain.noise[code] : 1.0 / K;
}

// Codes of the noise, by inversion of their distribution.
class NoiseCodes {
 public:
  NoiseCodes(const vqfast_levels &chain, int64_t K) : K_(K), cumulative_(buffer<double>(chain.noise ? K : 0)) {
    if (!chain.noise || !cumulative_) return;
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) cumulative_[k] = sum += chain.noise[k];
    inverted_ = true;
  }
  bool enough_memory() const { return (bool)cumulative_; }

  // The first code whose cumulative probability exceeds the uniform number.
  int64_t draw(uint64_t bits) const {
    if (!inverted_) return below(bits, K_);
    const double *first = cumulative_.get();
    return std::min<int64_t>(std::upper_bound(first, first + K_, uniform(bits)) - first, K_ - 1);
  }

 private:
  int64_t K_;
  Buffer<double> cumulative_;
  bool inverted_ = false;
};

// A clean token at a level of the chain, as its random bits say.
inline int64_t noised(const Shares &level, int64_t code, const RandomBits &bits, const NoiseCodes &noise, int64_t K) {
  const double part = uniform(bits.first);
  if (part < level.kept) return code;
  return level.masked > 0 && part >= level.kept + level.replaced ? K : noise.draw(bits.second);
}

// With p a one-hot of x_0, or its prediction, x_s given that it is a code is
//   (stay [j = x_t] + move) (signal p_j + spread m_j) / Z.
struct Step {
  double signal, spread;  // of x_s given x_0
  double stay, move;      // of x_t given x_s
  double flip;            // probability that x_s is a code: of a masked token, that it leaves the mask state
  double shift;           // what the marginal rule takes off the logit of x_t
  bool masked, certain;   // certain: x_s = x_t, whatever x_0 is

  Step(const vqfast_levels &chain, int64_t t, int64_t s, int64_t x_t, int64_t K, bool marginal) {
    const Shares at_t(chain, t), at_s(chain, s);
    const double codes = at_s.kept + at_s.replaced, unchanged = at_t.kept / at_s.kept;
    signal = at_s.kept / codes;
    spread = at_s.replaced / codes;
    masked = x_t >= K;
    flip = masked && at_t.masked > 0 ? (at_t.masked - at_s.masked) / at_t.masked : 1;
    stay = masked ? 0 : unchanged;
    const double m = masked ? 0 : noise_of(chain, x_t, K);
    move = masked ? 1 : std::max((at_t.kept + at_t.replaced) / codes - unchanged, 0.0) * m;
    certain = move == 0;
    shift = marginal && !masked && !certain ? std::log1p(at_t.kept / (at_t.replaced * m)) : 0;
  }
};

}  // namespace vqfast
