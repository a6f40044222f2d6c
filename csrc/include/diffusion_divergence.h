// The divergence of a step and its gradient, from what one pass over the logits of a token gives, for host and device
// code. kernels/diffusion_loss/README.md derives the formulas.
#pragma once

#include "diffusion_chain.h"

namespace vqfast {

// What is predicted of x_0: its log-probability, p, and 1 - p, neither a rounded difference of the other.
struct Target {
  double log_p, p, missed;
};

// What the loss needs of the logits of one token.
struct Prediction {
  Target x0;
  double p_t;               // of x_t, 0 where x_t is x_0 or the mask state
  double noise_0, noise_t;  // of x_0 and of x_t in x_s
  double logs;              // sum over all codes but x_0 of noise (log(1 + r) - r), r = signal p / noise
  double curvature;         // the same of noise (r - r / (1 + r))
};

// log(left), given lost = 1 - left as well: exact for both ends of 0..1.
VQFAST_HD double log_left(double left, double lost) { return lost < 0.5 ? log1p(-lost) : log(left); }

VQFAST_HD double negative_log(const Target &x) { return x.missed < 0.5 ? -log1p(-x.missed) : -x.log_p; }

// log(1 + r) - r; by its series where the difference would lose digits.
VQFAST_HD double log1p_minus(double r) { return r < 1e-4 ? r * r * (r * (1.0 / 3 - r / 4) - 0.5) : log1p(r) - r; }

// Probability of x_t, but for a factor: with x_0 known.
VQFAST_HD double evidence_of(const Step &c, const Prediction &x, bool stayed) {
  return c.move + c.stay * (stayed ? c.signal + x.noise_0 : x.noise_t);
}

// KL(q(x_s | x_t, x_0) || p(x_s | x_t)) over the codes. The terms of first order in p, which cancel, have been taken
// out by hand: what is left are terms of one sign, so that a small KL has as many right digits as a large one.
VQFAST_HD double divergence(const Step &c, const Prediction &x, bool stayed) {
  if (c.spread == 0) {
    if (!stayed) return negative_log(x.x0) + log1p(c.stay * x.p_t / c.move);
    const double odds = c.move * x.x0.missed / (c.move + c.stay);
    if (x.x0.p > 0) return log1p(odds / x.x0.p);
    return odds > 0 ? log(odds) - x.x0.log_p : 0;
  }
  const double evidence = evidence_of(c, x, stayed), most = c.signal + x.noise_0;
  const double q_x0 = (c.move + (stayed ? c.stay : 0)) * most / evidence;
  const double lost = c.signal * x.x0.missed / most;
  // Without noise at x_0 a p that has underflowed still has its logarithm.
  const double log_x0 = x.noise_0 > 0 ? log_left((c.signal * x.x0.p + x.noise_0) / most, lost) : -negative_log(x.x0);
  double kl = -q_x0 * (log_x0 + lost) - c.move / evidence * x.logs;
  if (stayed) {
    const double evidence_lost = c.stay * c.signal * x.x0.missed / evidence;
    kl += log_left((c.move + c.stay * (c.signal * x.x0.p + x.noise_0)) / evidence, evidence_lost) + evidence_lost;
  } else if (!c.masked) {
    kl += log1p(c.stay * c.signal * x.p_t / evidence) -
          c.stay * x.noise_t / evidence * log1p(c.signal * x.p_t / x.noise_t);
  }
  return kl;
}

// dKL/dlogit_k = p_k (base + slope r_k / (1 + r_k)), but for x_0 and x_t, whose values are at_x0 and at_x_t.
struct Gradient {
  double base, slope, at_x0, at_x_t;
};

VQFAST_HD double share_of_signal(const Step &c, double p, double noise) {
  return noise > 0 ? c.signal * p / (c.signal * p + noise) : 1;
}

VQFAST_HD Gradient gradient(const Step &c, const Prediction &x, bool stayed) {
  const double p_t = stayed ? x.x0.p : x.p_t;
  const double predicted = c.move + c.stay * (c.signal * p_t + (stayed ? x.noise_0 : x.noise_t));
  const double seen = predicted > 0 ? c.stay * c.signal * p_t / predicted : 1;
  // Sum of q_k r_k / (1 + r_k), q the true posterior. Without noise it is 1, all of it at x_0.
  double sum = 1, of_x0 = 1, of_x_t = 0, share_t = 0, slope = 0;
  if (c.spread > 0) {
    const double evidence = evidence_of(c, x, stayed);
    of_x0 =
        (c.move + (stayed ? c.stay : 0)) * (c.signal + x.noise_0) / evidence * share_of_signal(c, x.x0.p, x.noise_0);
    share_t = stayed || c.masked ? 0 : share_of_signal(c, x.p_t, x.noise_t);
    of_x_t = c.stay * x.noise_t / evidence * share_t;  // beyond what x_t has as any other code
    slope = c.move * c.signal / evidence;
    sum = of_x0 + of_x_t + c.move / evidence * (c.signal * x.x0.missed - x.curvature);
  }
  Gradient g;
  g.base = sum - seen - slope;
  g.slope = slope;
  g.at_x0 = x.x0.p * (sum - seen) - of_x0 + (stayed ? seen : 0);
  g.at_x_t = x.p_t * (g.base + slope * share_t) - of_x_t + seen;
  return g;
}

// A token of the loss. x_0 and x_t are left out of the passes over its logits and put in by hand.
struct LossToken {
  Step step;
  double noise_0, noise_t;  // of x_0 and of x_t in x_s
  bool stayed, apart;       // x_t is x_0; another code than x_0

  VQFAST_HD bool noisy() const { return step.spread > 0 && !step.certain; }
  VQFAST_HD bool reads(double scale, double aux_weight) const {
    return scale != 0 && !(step.certain && aux_weight == 0);
  }
  // Sum of the weights exp(logit - largest) of all codes, shifted as the rule asks. margin, margin_t: logits of x_0 and
  // of x_t (where apart) less the largest; others: sum of the other codes' weights.
  VQFAST_HD double total(double margin, double margin_t, double others) const {
    return others + exp(margin - (stayed ? step.shift : 0)) + (apart ? exp(margin_t - step.shift) : 0);
  }
};

VQFAST_HD LossToken loss_token(const vqfast_levels &chain, int64_t t, int64_t s, int64_t x_t, int64_t x0, int64_t K,
                               bool marginal) {
  LossToken token;
  token.step = step_of(chain, t, s, x_t, K, marginal);
  token.stayed = x_t == x0;
  token.apart = !token.stayed && !token.step.masked;
  token.noise_0 = token.step.spread * noise_of(chain, x0, K);
  token.noise_t = token.step.masked ? 0 : token.step.spread * noise_of(chain, x_t, K);
  return token;
}

// What a token costs, and its gradient: of the other codes weight (base + slope share), of x_0 at_x0, of x_t at_x_t.
struct LossRow {
  double loss;
  Gradient gradient;
};

// others, logs, curvature: sums over the other codes of weights and, where the token is noisy, of noise
// (log(1 + r) - r) and noise (r - r / (1 + r)). scale multiplies the gradient only.
VQFAST_HD LossRow finish_loss(const LossToken &token, double margin, double margin_t, double others, double logs,
                              double curvature, double scale, double aux_weight) {
  const Step &step = token.step;
  LossRow row = {0, {0, 0, 0, 0}};
  if (!step.certain) {
    const double shift_0 = token.stayed ? step.shift : 0;
    const double weight = exp(margin - shift_0), weight_t = token.apart ? exp(margin_t - step.shift) : 0;
    const double total = others + weight + weight_t;
    Prediction x;
    x.x0 = {margin - shift_0 - log(total), weight / total, (others + weight_t) / total};
    x.p_t = weight_t / total;
    x.noise_0 = token.noise_0;
    x.noise_t = token.noise_t;
    x.logs = logs;
    x.curvature = curvature;
    if (token.noisy() && token.apart) {
      const double r = step.signal * x.p_t / x.noise_t;
      x.logs += x.noise_t * log1p_minus(r);
      x.curvature += x.noise_t * r * (r / (1 + r));
    }
    row.loss = step.flip * divergence(step, x, token.stayed);
    const Gradient g = gradient(step, x, token.stayed);
    const double by = scale * step.flip;
    row.gradient = {by * g.base / total, by * g.slope / total, by * g.at_x0, by * g.at_x_t};
  }
  if (aux_weight != 0) {
    // The auxiliary term is of the prediction itself, without the marginal rule's shift.
    const double own = exp(margin), own_t = token.apart ? exp(margin_t) : 0, total = others + own + own_t;
    const Target x0 = {margin - log(total), own / total, (others + own_t) / total};
    const double by = scale * aux_weight;
    row.loss += aux_weight * negative_log(x0);
    row.gradient.base += by / total;
    row.gradient.at_x0 -= by * x0.missed;
    row.gradient.at_x_t += by * (own_t / total);
  }
  return row;
}

}  // namespace vqfast
