// Loss of a uniform-diffusion step and its gradient: one read of the logits, one write of the gradient.
// kernels/diffusion_loss/README.md derives the formulas.
#include <cmath>
#include <limits>
#include <type_traits>

#include "buffer.h"
#include "convert.h"
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

// One step of the chain: x_s given x_0 is `signal` [x_s = x_0] + `noise`, x_t given x_s is `stay` [x_t = x_s] + `move`.
struct Step {
  double signal, noise, stay, move;

  Step(double alpha_bar_s, double alpha_bar_t, int64_t K)
      : signal(alpha_bar_s),
        noise((1 - alpha_bar_s) / K),
        stay(alpha_bar_t / alpha_bar_s),
        move((1 - stay) / K) {}
};

// A fresh tensor's pages are mapped one by one as they are first written, which takes longer than the arithmetic: with
// pages of 2 MB there are 512 times fewer. A hint, for systems that give them on request only (Linux's "madvise").
void prefer_large_pages([[maybe_unused]] void *data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = sysconf(_SC_PAGESIZE), begin = ((uintptr_t)data + page - 1) / page * page;
  const uintptr_t end = ((uintptr_t)data + bytes) / page * page;
  if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// What the loss needs of the logits of one token.
struct Prediction {
  double log_p;      // of x_0
  double p, missed;  // of x_0: p and 1 - p, neither a rounded difference of the other
  double p_t;        // of x_t
  double logs;       // sum over all codes but x_0 of log(1 + r) - r, r = signal / noise p
  double curvature;  // the same of r - r / (1 + r)
};

// log(left), given lost = 1 - left as well: exact for both ends of 0..1.
double log_left(double left, double lost) { return lost < 0.5 ? std::log1p(-lost) : std::log(left); }

double negative_log(const Prediction &x) { return x.missed < 0.5 ? -std::log1p(-x.missed) : -x.log_p; }

// KL(q(x_s | x_t, x_0) || p(x_s | x_t)). The terms of first order in p, which cancel, have been taken out by hand:
// what is left are terms of one sign, so that a small KL has as many right digits as a large one.
double divergence(const Step &c, const Prediction &x, bool stayed) {
  if (c.noise == 0) {
    if (!stayed) return negative_log(x) + std::log1p(c.stay * x.p_t / c.move);
    const double odds = c.move * x.missed / (c.move + c.stay);
    if (x.p > 0) return std::log1p(odds / x.p);
    return odds > 0 ? std::log(odds) - x.log_p : 0;
  }
  const double signal = c.signal, noise = c.noise, stay = c.stay;
  const double ratio = signal / noise;
  const double evidence = c.move + stay * ((stayed ? signal : 0) + noise);
  const double q_x0 = (c.move + (stayed ? stay : 0)) * (signal + noise) / evidence;
  const double lost = signal * x.missed / (signal + noise);
  double kl = -q_x0 * (log_left((1 + ratio * x.p) / (1 + ratio), lost) + lost) - c.move * noise / evidence * x.logs;
  if (stayed) {
    const double evidence_lost = stay * signal * x.missed / evidence;
    kl += log_left((c.move + stay * (signal * x.p + noise)) / evidence, evidence_lost) + evidence_lost;
  } else {
    kl += std::log1p(stay * signal * x.p_t / evidence) - stay * noise / evidence * std::log1p(ratio * x.p_t);
  }
  return kl;
}

// dL/dlogit_k = p_k (base + slope r_k / (1 + r_k)), but for x_0 and x_t, whose values are at_x0 and at_x_t.
struct Gradient {
  double base, slope, at_x0, at_x_t;
};

Gradient gradient(const Step &c, const Prediction &x, bool stayed, double aux_weight) {
  const double p_t = stayed ? x.p : x.p_t;
  const double predicted = c.move + c.stay * (c.signal * p_t + c.noise);
  const double seen = predicted > 0 ? c.stay * c.signal * p_t / predicted : 1;
  // Sum of q_k r_k / (1 + r_k), q the true posterior. Without noise it is 1, all of it at x_0.
  double sum = 1, of_x0 = 1, of_x_t = 0, share_t = 0, slope = 0;
  if (c.noise > 0) {
    const double ratio = c.signal / c.noise;
    const double evidence = c.move + c.stay * ((stayed ? c.signal : 0) + c.noise);
    const auto share = [&](double p) { return ratio * p / (1 + ratio * p); };
    of_x0 = (c.move + (stayed ? c.stay : 0)) * (c.signal + c.noise) / evidence * share(x.p);
    share_t = stayed ? 0 : share(x.p_t);
    of_x_t = c.stay * c.noise / evidence * share_t;  // beyond what x_t has as any other code
    slope = c.move * c.signal / evidence;
    sum = of_x0 + of_x_t + c.move * c.noise / evidence * (ratio * x.missed - x.curvature);
  }
  Gradient g;
  g.base = sum - seen + aux_weight - slope;
  g.slope = slope;
  g.at_x0 = x.p * (sum - seen) - of_x0 + (stayed ? seen : 0) - aux_weight * x.missed;
  g.at_x_t = x.p_t * (g.base + slope * share_t) - of_x_t + seen;
  return g;
}

template <class Passes>
struct Batch {
  const void *logits;
  const int64_t *x0, *x_t, *t, *s;
  const double *alpha_bar;
  int64_t B, L, K;
  const double *scale;
  double aux_weight;
  void *loss, *grad;

  typedef typename Passes::Real Real;

  // weights, shares: scratch for K scores; sums: for one number a block of codes.
  void row(const Passes &passes, int64_t n, Real *weights, Real *shares, double *sums, bool past_caches) const {
    const int64_t b = n / L, target = x0[n], seen = x_t[n], padded = passes.padded(K);
    const bool stayed = seen == target;
    const Step step(alpha_bar[s[b]], alpha_bar[t[b]], K);
    void *grad_row = grad ? (char *)grad + n * K * passes.size() : nullptr;

    const char *logits_row = (const char *)logits + n * K * passes.size();
    const Real largest = passes.load(logits_row, K, weights);
    const double margin = (double)weights[target] - largest;
    // x_0 is left out of every sum over the codes and put in by hand.
    weights[target] = -std::numeric_limits<Real>::infinity();
    const double others = passes.exp(weights, padded, largest, 1, sums, logits_row + K * passes.size());
    const double weight = std::exp(margin), total = weight + others;

    Prediction x = {};
    x.log_p = margin - std::log(total);
    x.p = weight / total;
    x.missed = others / total;
    x.p_t = stayed ? 0 : weights[seen] / total;
    const bool noisy = step.noise > 0;
    if (noisy && total == total)
      x.logs = passes.log1p(weights, padded, step.signal / step.noise / total, grad ? shares : nullptr,
                            &x.curvature);
    double value = divergence(step, x, stayed);
    if (aux_weight != 0) value += aux_weight * negative_log(x);
    ((Real *)loss)[n] = total == total ? value : std::numeric_limits<Real>::quiet_NaN();
    if (!grad) return;

    Gradient g = gradient(step, x, stayed, aux_weight);
    if (total != total) {
      std::fill(weights, weights + padded, std::numeric_limits<Real>::quiet_NaN());
    } else {
      const double by = scale[b];
      passes.grad(weights, padded, by * g.base / total, by * g.slope / total, noisy ? shares : nullptr);
      weights[target] = by * g.at_x0;
      if (!stayed) weights[seen] = by * g.at_x_t;
    }
    passes.store(weights, K, grad_row, past_caches);
  }

  int run(vqfast_dtype dtype) const {
    bool enough = true;
    const int64_t bytes = B * L * K * element_size(dtype);
    const bool past_caches = bytes > kStreamBytes;
    if (grad && past_caches) prefer_large_pages(grad, bytes);
#pragma omp parallel reduction(&& : enough) if (B * L * K > kParallelElements)
    {
      const Passes passes(dtype);
      const int64_t padded = passes.padded(K);
      const Buffer<Real> weights = buffer<Real>(padded), shares = buffer<Real>(padded);
      const Buffer<double> sums = buffer<double>(padded / kBlockCodes + 1);
      enough = weights && shares && sums;
#pragma omp for schedule(static)
      for (int64_t n = 0; n < B * L; ++n)
        if (enough) row(passes, n, weights.get(), shares.get(), sums.get(), past_caches);
    }
    return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
  }
};

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_uniform_diffusion_loss(vqfast_dtype dtype, const void *logits, const int64_t *x0,
                                                 const int64_t *x_t, const int64_t *t, const int64_t *s,
                                                 const double *alpha_bar, int64_t, int64_t B, int64_t L, int64_t K,
                                                 const double *scale, double aux_weight, void *loss, void *grad) {
  return with_passes(dtype, [&](auto *type) {
    typedef std::remove_pointer_t<decltype(type)> Passes;
    const Batch<Passes> batch = {logits, x0, x_t, t, s, alpha_bar, B, L, K, scale, aux_weight, loss, grad};
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
