// Loss of a diffusion step and its gradient: one read of the logits, one write of the gradient.
// kernels/diffusion_loss/README.md derives the formulas.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "buffer.h"
#include "convert.h"
#include "diffusion_chain.h"
#include "diffusion_divergence.h"
#include "dispatch.h"
#include "pages.h"
#include "score_passes.h"
#include "vqfast.h"

namespace vqfast {
namespace {

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
    const LossToken token = loss_token(chain, t[b], s[b], seen, target, K, marginal);
    if (!token.reads(scale[n], aux_weight)) {  // nothing to learn
      ((Real *)loss)[n] = 0;
      if (grad) std::memset(grad_row, 0, K * passes.size());
      return;
    }

    const char *logits_row = (const char *)logits + n * K * passes.size();
    const Real largest = passes.load(logits_row, K, weights);
    const double margin = (double)weights[target] - largest;
    const double margin_t = token.apart ? (double)weights[seen] - largest : 0;
    weights[target] = -std::numeric_limits<Real>::infinity();
    if (token.apart) weights[seen] = -std::numeric_limits<Real>::infinity();
    const double others = passes.exp(weights, padded, largest, 1, sums, logits_row + K * passes.size());
    const double total = token.total(margin, margin_t, others);
    if (!(total == total)) {
      ((Real *)loss)[n] = std::numeric_limits<Real>::quiet_NaN();
      if (!grad) return;
      std::fill(weights, weights + padded, std::numeric_limits<Real>::quiet_NaN());
      passes.store(weights, K, grad_row, past_caches);
      return;
    }

    double logs = 0, curvature = 0;
    if (token.noisy()) {
      const double spread = noise.noise ? token.step.spread : token.noise_0;
      const double ratio = token.step.signal / spread / total;
      logs = spread *
             passes.log1p(weights, padded, ratio, noise.noise, noise.inverse, grad ? shares : nullptr, &curvature);
      curvature *= spread;
    }
    const LossRow row = finish_loss(token, margin, margin_t, others, logs, curvature, scale[n], aux_weight);
    ((Real *)loss)[n] = row.loss;
    if (!grad) return;
    passes.grad(weights, padded, row.gradient.base, row.gradient.slope, token.noisy() ? shares : nullptr);
    weights[target] = row.gradient.at_x0;
    if (token.apart) weights[seen] = row.gradient.at_x_t;
    passes.store(weights, K, grad_row, past_caches);
  }

  int run(vqfast_dtype dtype) const {
    const int64_t bytes = B * L * K * element_size(dtype), widest = Passes(dtype).padded(K);
    const bool past_caches = bytes > kLargeResult;
    if (grad) prefer_large_pages(grad, bytes);
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
                                         const int64_t *t, const int64_t *s, vqfast_levels levels, int64_t B, int64_t L,
                                         int64_t K, const double *scale, int marginal, double aux_weight, void *loss,
                                         void *grad) {
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
