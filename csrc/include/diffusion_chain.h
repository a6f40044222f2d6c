// What a transition family does to a token in a step from t to s < t, for host and device code.
// kernels/posterior/README.md derives the formulas.
#pragma once

#include <math.h>

#include "philox.h"
#include "vqfast.h"

namespace vqfast {

// Of a clean token at some level: still itself, replaced by another code, in the mask state.
struct Shares {
  double kept, replaced, masked;
};

VQFAST_HD Shares shares(const vqfast_levels &chain, int64_t level) {
  const double kept = chain.levels[level * chain.columns];
  const double masked = chain.columns == 2 ? chain.levels[level * 2 + 1] : 0;
  return {kept, fmax((1 - kept) - masked, 0.0), masked};
}

VQFAST_HD double noise_of(const vqfast_levels &chain, int64_t code, int64_t K) {
  return chain.noise ? chain.noise[code] : 1.0 / (double)K;
}

// A code of the noise: the first whose cumulative probability exceeds the uniform number.
VQFAST_HD int64_t noise_code(const vqfast_levels &chain, uint64_t bits, int64_t K) {
  if (!chain.noise) return below(bits, K);
  const double mark = uniform(bits);
  int64_t first = 0;
  // Without a branch, which would be a guess each time.
  for (int64_t left = K, half; left > 1; left -= half) {
    half = left / 2;
    first += chain.cumulative[first + half - 1] > mark ? 0 : half;
  }
  return first;
}

// A clean token at the level of these shares, as its random bits say.
VQFAST_HD int64_t noised(const vqfast_levels &chain, const Shares &at, int64_t code, const RandomBits &bits,
                         int64_t K) {
  const double part = uniform(bits.first);
  if (part < at.kept) return code;
  return at.masked > 0 && part >= at.kept + at.replaced ? K : noise_code(chain, bits.second, K);
}

// With p a one-hot of x_0, or its prediction, x_s given that it is a code is
//   (stay [j = x_t] + move) (signal p_j + spread m_j) / Z.
struct Step {
  double signal, spread;  // of x_s given x_0
  double stay, move;      // of x_t given x_s
  double flip;            // probability that x_s is a code: of a masked token, that it leaves the mask state
  double shift;           // what the marginal rule takes off the logit of x_t
  bool masked, certain;   // certain: x_s = x_t, whatever x_0 is
};

VQFAST_HD Step step_of(const vqfast_levels &chain, int64_t t, int64_t s, int64_t x_t, int64_t K, bool marginal) {
  const Shares at_t = shares(chain, t), at_s = shares(chain, s);
  const double codes = at_s.kept + at_s.replaced, unchanged = at_t.kept / at_s.kept;
  Step step;
  step.signal = at_s.kept / codes;
  step.spread = at_s.replaced / codes;
  step.masked = x_t >= K;
  step.flip = step.masked && at_t.masked > 0 ? (at_t.masked - at_s.masked) / at_t.masked : 1;
  step.stay = step.masked ? 0 : unchanged;
  const double m = step.masked ? 0 : noise_of(chain, x_t, K);
  step.move = step.masked ? 1 : fmax((at_t.kept + at_t.replaced) / codes - unchanged, 0.0) * m;
  step.certain = step.move == 0;
  step.shift = marginal && !step.masked && !step.certain ? log1p(at_t.kept / (at_t.replaced * m)) : 0;
  return step;
}

// A draw of x_s: a mixture of staying at x_t, a code of the noise and a code of the prediction. `decided` once it is
// known that it is not the last; x_s says then what it is.
struct ReverseDraw {
  Step step;
  int64_t x_s;
  uint64_t code_bits;
  double part, of_noise, replaced, predicted;
  bool decided;
};

// As far as it goes without the logits. known: the clean code that is given, or below 0.
VQFAST_HD ReverseDraw begin_draw(const vqfast_levels &chain, int64_t t, int64_t s, int64_t x_t, int64_t known,
                                 int64_t K, bool marginal, const RandomBits &bits) {
  ReverseDraw draw;
  draw.x_s = x_t;
  draw.decided = true;
  draw.step = step_of(chain, t, s, x_t, K, marginal);
  if (known >= 0) {
    draw.x_s = noised(chain, shares(chain, s), known, bits, K);
    return draw;
  }
  if (draw.step.certain) return draw;
  const Step &step = draw.step;
  const double moving = step.masked ? step.flip : step.move;
  draw.code_bits = bits.second;
  draw.part = uniform(bits.first);
  draw.replaced = moving * (1 - step.signal);
  draw.predicted = moving * step.signal;
  // The weight of staying grows with p(x_t). Where even p(x_t) = 0 means to stay, as for most tokens of a long chain,
  // the logits need not be read. A masked token's weights do not depend on them at all.
  draw.of_noise = step.masked ? 0 : step.spread * noise_of(chain, x_t, K);
  const double least = step.masked ? 1 - step.flip : step.stay * draw.of_noise;
  const double mark = draw.part * (least + draw.replaced + draw.predicted);
  if (mark < least) return draw;
  draw.decided = step.masked && mark < least + draw.replaced;
  if (draw.decided) draw.x_s = noise_code(chain, bits.second, K);
  return draw;
}

// With p(x_t) of the prediction; without a prediction (NaN, all impossible) x_s is a code whatever happens.
VQFAST_HD void settle_draw(ReverseDraw &draw, const vqfast_levels &chain, double p_t, bool valid, int64_t K) {
  const Step &step = draw.step;
  bool stays = !valid && !step.masked, replaced = !valid && step.masked;
  if (valid && !step.masked) {
    const double kept = step.stay * (step.signal * p_t + draw.of_noise);
    const double mark = draw.part * (kept + draw.replaced + draw.predicted);
    stays = mark < kept;
    replaced = !stays && mark < kept + draw.replaced;
  }
  draw.decided = stays || replaced;
  if (replaced) draw.x_s = noise_code(chain, draw.code_bits, K);
}

}  // namespace vqfast
