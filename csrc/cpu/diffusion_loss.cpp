// Loss of a diffusion step and its gradient: one read of the logits, one write of the gradient.
// kernels/diffusion_loss/README.md derives the formulas.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "buffer.h"
#include "convert.h"
#include "diffusion_chain.h"
#include "dispatch.h"
#include "score_passes.h"
#include "vqfast.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace vqfast {
namespace {

constexpr int64_t kStreamBytes = 4 << 20;  // a gradient larger than the second-level caches goes past them

// A fresh tensor's pages are mapped one by one as they are first written, which takes longer than the arithmetic: with
// pages of 2 MB there are 512 times fewer. A hint, for systems that give them on request only (Linux's "madvise").
void prefer_large_pages([[maybe_unused]] void *data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = sysconf(_SC_PAGESIZE), begin = ((uintptr_t)data + page - 1) / page * page;
  const uintptr_t end = ((uintptr_t)data + bytes) / page * page;
  if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// What is predicted of x_0: its log-probability, p, and 1 - p, neither a rounded difference of the other.
struct Target {
  double log_p, p, missed;
};

// What the loss needs of the logits of one token.
struct Prediction {
  Target x0;
  double p_t;        // of x_t, 0 where x_t is x_0 or the mask state
  double noise_0, noise_t;  // of x_0 and of x_t in x_s
  double logs;       // sum over all codes but x_0 of noise (log(1 + r) - r), r = signal p / noise
  double curvature;  // the same of noise (r - r / (1 + r))
};

// log(left), given lost = 1 - left as well: exact for both ends of 0..1.
double log_left(double left, double lost) { return lost < 0.5 ? std::log1p(-lost) : std::log(left); }

double negative_log(const Target &x) { return x.missed < 0.5 ? -std::log1p(-x.missed) : -x.log_p; }

// log(1 + r) - r; by its series where the difference would lose digits.
double log1p_minus(double r) { return r < 1e-4 ? r * r * (r * (1.0 / 3 - r / 4) - 0.5) : std::log1p(r) - r; }

// Probability of x_t, but for a factor: with x_0 known.
double evidence_of(const Step &c, const Prediction &x, bool stayed) {
  return c.move + c.stay * (stayed ? c.signal + x.noise_0 : x.noise_t);
}

// KL(q(x_s | x_t, x_0) || p(x_s | x_t)) over the codes. The terms of first order in p, which cancel, have been taken
// out by hand: what is left are terms of one sign, so that a small KL has as many right digits as a large one.
double divergence(const Step &c, const Prediction &x, bool stayed) {
  if (c.spread == 0) {
    if (!stayed) return negative_log(x.x0) + std::log1p(c.stay * x.p_t / c.move);
    const double odds = c.move * x.x0.missed / (c.move + c.stay);
    if (x.x0.p > 0) return std::log1p(odds / x.x0.p);
    return odds > 0 ? std::log(odds) - x.x0.log_p : 0;
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
    kl += std::log1p(c.stay * c.signal * x.p_t / evidence) -
          c.stay * x.noise_t / evidence * std::log1p(c.signal * x.p_t / x.noise_t);
  }
  return kl;
}

// dKL/dlogit_k = p_k (base + slope r_k / (1 + r_k)), but for x_0 and x_t, whose values are at_x0 and at_x_t.
struct Gradient {
  double base, slope, at_x0, at_x_t;
};

Gradient gradient(const Step &c, const Prediction &x, bool stayed) {
  const double p_t = stayed ? x.x0.p : x.p_t;
  const double predicted = c.move + c.stay * (c.signal * p_t + (stayed ? x.noise_0 : x.noise_t));
  const double seen = predicted > 0 ? c.stay * c.signal * p_t / predicted : 1;
  // Sum of q_k r_k / (1 + r_k), q the true posterior. Without noise it is 1, all of it at x_0.
  double sum = 1, of_x0 = 1, of_x_t = 0, share_t = 0, slope = 0;
  if (c.spread > 0) {
    const double evidence = evidence_of(c, x, stayed);
    const auto share = [&](double p, double noise) { return noise > 0 ? c.signal * p / (c.signal * p + noise) : 1; };
    of_x0 = (c.move + (stayed ? c.stay : 0)) * (c.signal + x.noise_0) / evidence * share(x.x0.p, x.noise_0);
    share_t = stayed || c.masked ? 0 : share(x.p_t, x.noise_t);
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

template <class Passes>
struct Batch {
  const void *logits;
  const int64_t *x0, *x_t, *t, *s;
  vqfast_levels chain;
  int64_t B, L, K;
  const double *scale;
  bool marginal;
  double aux_weight;
  void *loss, *grad;

  typedef typename Passes::Real Real;

  // Noise of each code, and its inverse, for passes over codes; null where it is the same for all.
  struct Noise {
    const Real *noise, *inverse;
  };

  // weights, shares: scratch for K scores; sums: for one number a block of codes.
  void row(const Passes &passes, int64_t n, const Noise &noise, Real *weights, Real *shares, double *sums,
           bool past_caches) const {
    const int64_t b = n / L, target = x0[n], seen = x_t[n], padded = passes.padded(K);
    void *grad_row = grad ? (char *)grad + n * K * passes.size() : nullptr;
    const Step step(chain, t[b], s[b], seen, K, marginal);
    if (scale[n] == 0 || (step.certain && aux_weight == 0)) {  // nothing to learn: the logits are not read
      ((Real *)loss)[n] = 0;
      if (grad) std::memset(grad_row, 0, K * passes.size());
      return;
    }
    const bool stayed = seen == target, apart = !stayed && !step.masked;

    const char *logits_row = (const char *)logits + n * K * passes.size();
    const Real largest = passes.load(logits_row, K, weights);
    const double margin = (double)weights[target] - largest, margin_t = apart ? (double)weights[seen] - largest : 0;
    // x_0 and x_t are left out of every sum over the codes and put in by hand.
    weights[target] = -std::numeric_limits<Real>::infinity();
    if (apart) weights[seen] = -std::numeric_limits<Real>::infinity();
    const double others = passes.exp(weights, padded, largest, 1, sums, logits_row + K * passes.size());

    const double shift_0 = stayed ? step.shift : 0;
    const double weight = std::exp(margin - shift_0), weight_t = apart ? std::exp(margin_t - step.shift) : 0;
    const double total = others + weight + weight_t;
    if (!(total == total)) {
      ((Real *)loss)[n] = std::numeric_limits<Real>::quiet_NaN();
      if (!grad) return;
      std::fill(weights, weights + padded, std::numeric_limits<Real>::quiet_NaN());
      passes.store(weights, K, grad_row, past_caches);
      return;
    }

    const bool noisy = step.spread > 0 && !step.certain;
    double value = 0;
    Gradient g = {};
    if (!step.certain) {
      Prediction x = {};
      x.x0 = {margin - shift_0 - std::log(total), weight / total, (others + weight_t) / total};
      x.p_t = weight_t / total;
      x.noise_0 = step.spread * noise_of(chain, target, K);
      x.noise_t = step.masked ? 0 : step.spread * noise_of(chain, seen, K);
      if (noisy) {
        const double spread = noise.noise ? step.spread : x.noise_0, ratio = step.signal / spread / total;
        x.logs = spread * passes.log1p(weights, padded, ratio, noise.noise, noise.inverse, grad ? shares : nullptr,
                                       &x.curvature);
        x.curvature *= spread;
        if (apart) {
          const double r = step.signal * x.p_t / x.noise_t;
          x.logs += x.noise_t * log1p_minus(r);
          x.curvature += x.noise_t * r * (r / (1 + r));
        }
      }
      value = step.flip * divergence(step, x, stayed);
      if (grad) g = gradient(step, x, stayed);
    }

    // The auxiliary term is of the prediction itself, without the marginal rule's shift.
    const double own = std::exp(margin), own_t = apart ? std::exp(margin_t) : 0, own_total = others + own + own_t;
    const Target plain = {margin - std::log(own_total), own / own_total, (others + own_t) / own_total};
    if (aux_weight != 0) value += aux_weight * negative_log(plain);
    ((Real *)loss)[n] = value;
    if (!grad) return;

    const double by = scale[n], by_kl = by * step.flip, by_aux = by * aux_weight;
    passes.grad(weights, padded, by_kl * g.base / total + by_aux / own_total, by_kl * g.slope / total,
                noisy ? shares : nullptr);
    weights[target] = by_kl * g.at_x0 - by_aux * plain.missed;
    if (apart) weights[seen] = by_kl * g.at_x_t + by_aux * (own_t / own_total);
    passes.store(weights, K, grad_row, past_caches);
  }

  int run(vqfast_dtype dtype) const {
    const int64_t bytes = B * L * K * element_size(dtype), widest = Passes(dtype).padded(K);
    const bool past_caches = bytes > kStreamBytes;
    if (grad && past_caches) prefer_large_pages(grad, bytes);
    const Buffer<Real> table = buffer<Real>(chain.noise ? 2 * widest : 0);
    bool enough = (bool)table;
    Noise noise = {};
    if (chain.noise && enough) {
      // A code that no noise gives has r = infinity, and noise times r is what counts: with this it is right to 1e-18.
      constexpr double kLeast = 1e-18;
      for (int64_t k = 0; k < widest; ++k) {
        const double m = k < K ? std::max(chain.noise[k], kLeast) : 1;
        table[k] = m;
        table[widest + k] = 1 / m;
      }
      noise = {table.get(), table.get() + widest};
    }
#pragma omp parallel reduction(&& : enough) if (B * L * K > kParallelElements)
    {
      const Passes passes(dtype);
      const int64_t padded = passes.padded(K);
      const Buffer<Real> weights = buffer<Real>(padded), shares = buffer<Real>(padded);
      const Buffer<double> sums = buffer<double>(padded / kBlockCodes + 1);
      enough = enough && weights && shares && sums;
#pragma omp for schedule(static)
      for (int64_t n = 0; n < B * L; ++n)
        if (enough) row(passes, n, noise, weights.get(), shares.get(), sums.get(), past_caches);
    }
    return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
  }
};

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_diffusion_loss(vqfast_dtype dtype, const void *logits, const int64_t *x0, const int64_t *x_t,
                                         const int64_t *t, const int64_t *s, vqfast_levels levels, int64_t B,
                                         int64_t L, int64_t K, const double *scale, int marginal, double aux_weight,
                                         void *loss, void *grad) {
  return with_passes(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> Passes;
    const Batch<Passes> batch = {logits, x0, x_t, t, s, levels, B, L, K, scale, marginal != 0, aux_weight, loss, grad};
    return batch.run(dtype);
  });
}

extern "C" int vqfast_cpu_scale_rows(vqfast_dtype dtype, void *rows, int64_t R, int64_t K, const void *scale,
                                     int64_t stride) {
  if (dtype < VQFAST_F32 || dtype > VQFAST_F16) return VQFAST_BAD_DTYPE;
  const auto scale_of = [&](int64_t r) {
    return dtype == VQFAST_F64 ? ((const double *)scale)[r * stride] : ((const float *)scale)[r * stride];
  };
  if (R == 0 || (stride == 0 && scale_of(0) == 1)) return VQFAST_OK;
  const Kernels &isa = kernels();
  const int64_t bytes = K * element_size(dtype);
#pragma omp parallel for schedule(static) if (R * K > kParallelElements)
  for (int64_t r = 0; r < R; ++r) {
    const double by = scale_of(r);
    if (by != 1) isa.scale_row(dtype, (char *)rows + r * bytes, K, by);
  }
  return VQFAST_OK;
}
