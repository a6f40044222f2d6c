// Loss and reverse step of chains through matrices: tiles of rows go from logits to the result without leaving the
// caches, through one product with the tile's matrix, or two. kernels/matrix_loss/README.md derives the formulas.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "buffer.h"
#include "convert.h"
#include "diffusion_truncate.h"
#include "dispatch.h"
#include "locate.h"
#include "philox.h"
#include "vqfast.h"

namespace vqfast {
namespace {

constexpr int64_t kGroupsApart = 4;  // priors for each thread, from which on their unequal shares do not show
constexpr int64_t kParallelProducts = 1 << 18;  // multiply-adds of a product, below which one thread is as fast

// What a thread works in: tiles of rows of n numbers, and a few such rows.
class Scratch {
 public:
  static constexpr int kTiles = 5, kRows = 3;
  Scratch(int64_t tile_rows, int64_t n)
      : n_(n), tile_(tile_rows * n), memory_(buffer<double>((kTiles + 1) * tile_ + kRows * n + n / kBlockCodes + 1)) {
    if (memory_) std::fill(memory_.get(), memory_.get() + kTiles * tile_, 0);
  }
  explicit operator bool() const { return (bool)memory_; }
  double *tile(int i) const { return memory_.get() + i * tile_; }
  double *values() const { return tile(kTiles); }  // of a product
  double *row(int i) const { return tile(kTiles + 1) + i * n_; }
  double *sums() const { return row(kRows); }

 private:
  int64_t n_, tile_;
  Buffer<double> memory_;
};

// A prior as `multiply_rows` reads it, and its transpose.
struct Panels {
  Buffer<double> forward, backward;

  Panels(int64_t size, bool transposed)
      : forward(buffer<double>(size)), backward(buffer<double>(transposed ? size : 0)) {}
  explicit operator bool() const { return forward && backward; }
};

// Where a tile's rows are, and what they are multiplied with.
struct Tile {
  int64_t first, count;
  const double *forward, *backward;  // panels of the prior and of its transpose
};

struct Batch {
  vqfast_dtype dtype;
  const void *logits;
  const int64_t *x_t, *s;
  vqfast_step step;
  int64_t B, L, K;
  bool marginal;
  const Kernels &isa = kernels();

  int64_t padded() const { return (K + isa.matrix_panel - 1) / isa.matrix_panel * isa.matrix_panel; }
  const char *logits_of(const void *rows, int64_t row) const {
    return (const char *)rows + row * K * element_size(dtype);
  }
  const double *prior(int64_t row, int64_t code) const { return step.prior + row / L * step.stride_prior + code * K; }
  const double *likelihood(int64_t row) const {
    return step.likelihood + row / L * step.stride_likelihood + x_t[row] * K;
  }
  bool at_data(int64_t row) const { return s[row / L] == 0; }

  void multiply(const double *rows, const double *panels, const Scratch &scratch, double *out) const {
    isa.multiply_rows(rows, panels, K, padded(), scratch.values(), out);
  }

  // Calls body(Tile, scratch) for all rows; samples that share a prior share its panels.
  template <class Body>
  int run(bool transposed, Body body) const {
    if (B * L == 0) return VQFAST_OK;
    const int64_t n = padded(), panels = n / isa.matrix_panel;
    const int64_t groups = step.stride_prior ? B : 1, rows = B * L / groups;
    const int64_t tiles = (rows + isa.matrix_rows - 1) / isa.matrix_rows;
    const int64_t threads = B * L * K > kParallelElements ? omp_get_max_threads() : 1;
    // With many priors a thread packs those of its own samples, and none waits for another.
    const bool apart = groups >= kGroupsApart * threads;
    const Panels together(apart ? 0 : n * K, transposed);
    const auto pack = [&](int64_t group, int64_t i, const Panels &to) {
      const double *matrix = step.prior + group * step.stride_prior;
      isa.pack_matrix(matrix, K, false, i, i + 1, to.forward.get());
      if (transposed) isa.pack_matrix(matrix, K, true, i, i + 1, to.backward.get());
    };
    const auto work = [&](int64_t group, int64_t i, const Panels &with, const Scratch &scratch) {
      const int64_t first = i * isa.matrix_rows, count = std::min<int64_t>(rows - first, isa.matrix_rows);
      body(Tile{group * rows + first, count, with.forward.get(), with.backward.get()}, scratch);
    };
    bool enough = (bool)together;
#pragma omp parallel reduction(&& : enough) if (threads > 1)
    {
      const FlushSubnormals flush;
      const Scratch scratch(isa.matrix_rows, n);
      const Panels own(apart ? n * K : 0, transposed);
      const bool ready = together && own && scratch;
      enough = ready;
      if (apart) {
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < groups; ++group) {
          for (int64_t i = 0; ready && i < panels; ++i) pack(group, i, own);
          for (int64_t i = 0; ready && i < tiles; ++i) work(group, i, own, scratch);
        }
      } else {
        for (int64_t group = 0; group < groups; ++group) {
#pragma omp for schedule(static)
          for (int64_t i = 0; i < panels; ++i)
            if (together) pack(group, i, together);
#pragma omp for schedule(static)
          for (int64_t i = 0; i < tiles; ++i)
            if (ready) work(group, i, together, scratch);
        }
      }
    }
    return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
  }

  // q(x_t | x_0) for every x_0, of the rows that are `wanted`; f: scratch for a tile.
  template <class Wanted>
  void evidence(const Tile &tile, const Scratch &scratch, Wanted wanted, double *f, double *q) const {
    const int64_t n = padded();
    for (int64_t r = 0; r < tile.count; ++r)
      if (wanted(r)) std::memcpy(f + r * n, likelihood(tile.first + r), K * sizeof(double));
    multiply(f, tile.backward, scratch, q);
  }
};

struct Loss {
  Batch batch;
  const int64_t *x0;
  const double *scale;
  double aux_weight;
  void *loss, *grad;

  // scores become log p; and p.
  void normalise(double *scores, double *p, double largest, const Scratch &scratch) const {
    const int64_t n = batch.padded();
    const double total = batch.isa.exp_wide_scores(scores, n, largest, 1, p, scratch.sums());
    const double shift = largest + std::log(total), share = 1 / total;
    for (int64_t k = 0; k < n; ++k) scores[k] -= shift, p[k] *= share;
  }

  void store(int64_t row, double value, const double *gradient, float *narrow) const {
    if (batch.dtype == VQFAST_F64)
      ((double *)loss)[row] = value;
    else
      ((float *)loss)[row] = (float)value;
    if (!grad) return;
    char *to = (char *)grad + row * batch.K * element_size(batch.dtype);
    if (batch.dtype == VQFAST_F64) {
      std::memcpy(to, gradient, batch.K * sizeof(double));
      return;
    }
    for (int64_t k = 0; k < batch.K; ++k) narrow[k] = (float)gradient[k];
    batch.isa.store_scores(batch.dtype, narrow, batch.K, to, false);
  }

  void operator()(const Tile &tile, const Scratch &scratch) const {
    const int64_t n = batch.padded(), K = batch.K;
    double *log_p = scratch.tile(0), *p = scratch.tile(1), *model = scratch.tile(2), *back = scratch.tile(3);
    double *log_x0 = batch.marginal ? scratch.tile(4) : log_p;
    const auto counts = [&](int64_t r) { return scale[tile.first + r] != 0; };
    bool multiplies = false;
    for (int64_t r = 0; r < tile.count; ++r) {
      const int64_t row = tile.first + r;
      if (!counts(r)) {  // zeros, so that no number of another token is multiplied
        std::fill(p + r * n, p + (r + 1) * n, 0);
        continue;
      }
      multiplies = multiplies || !batch.at_data(row);
      const double largest =
          batch.isa.load_wide_scores(batch.dtype, batch.logits_of(batch.logits, row), K, n, log_p + r * n);
      normalise(log_p + r * n, p + r * n, largest, scratch);
    }
    if (batch.marginal) {
      batch.evidence(tile, scratch, counts, model, back);
      for (int64_t r = 0; r < tile.count; ++r) {
        if (!counts(r)) continue;
        std::copy(log_p + r * n, log_p + (r + 1) * n, log_x0 + r * n);
        normalise(log_x0 + r * n, p + r * n, batch.isa.subtract_logs(log_x0 + r * n, back + r * n, n), scratch);
      }
    }

    if (multiplies) batch.multiply(p, tile.forward, scratch, model);
    double value[kMostMatrixRows];
    for (int64_t r = 0; r < tile.count; ++r) {
      const int64_t row = tile.first + r;
      double *own = model + r * n;
      value[r] = 0;
      if (!counts(r)) {
        std::fill(own, own + n, 0);
        continue;
      }
      if (batch.at_data(row)) std::copy(log_x0 + r * n, log_x0 + (r + 1) * n, own);
      value[r] = batch.isa.diverge(batch.likelihood(row), batch.prior(row, x0[row]), own, batch.at_data(row), K, n,
                                   scratch.row(0), scratch.row(1), scratch.row(2));
      if (aux_weight != 0) value[r] -= aux_weight * log_p[r * n + x0[row]];
    }
    if (grad && multiplies) batch.multiply(model, tile.backward, scratch, back);
    for (int64_t r = 0; r < tile.count; ++r) {
      const int64_t row = tile.first + r;
      double *gradient = scratch.row(0);
      if (grad)
        write_gradient(row, log_p + r * n, p + r * n, model + r * n, back + r * n, scratch.row(1), scratch.sums(),
                       gradient);
      store(row, value[r], gradient, (float *)scratch.row(2));
    }
  }

  void write_gradient(int64_t row, const double *log_p, const double *p, const double *slope, const double *back,
                      double *own, double *sums, double *gradient) const {
    const int64_t n = batch.padded(), K = batch.K;
    const double by = scale[row];
    if (by == 0) {
      std::fill(gradient, gradient + K, 0);
      return;
    }
    if (batch.at_data(row))
      for (int64_t k = 0; k < K; ++k) gradient[k] = by * slope[k];
    else
      for (int64_t k = 0; k < K; ++k) gradient[k] = by * (p[k] * back[k]);
    if (aux_weight == 0) return;
    batch.isa.exp_wide_scores(log_p, n, 0, 1, own, sums);
    for (int64_t k = 0; k < K; ++k) gradient[k] += by * aux_weight * own[k];
    gradient[x0[row]] -= by * aux_weight;
  }
};

struct Reverse {
  Batch batch;
  const void *unconditional;
  const int64_t *known;
  double temperature, guidance;
  Truncation keep;
  const int64_t *key;
  int64_t *x_s;

  // scores less their largest, over the temperature; -infinity for codes that are not kept. Returns the largest.
  double predict(int64_t row, double *scores, double *weights, double *other, double *sums) const {
    const int64_t n = batch.padded(), K = batch.K;
    double largest = batch.isa.load_wide_scores(batch.dtype, batch.logits_of(batch.logits, row), K, n, scores);
    if (unconditional) {
      batch.isa.load_wide_scores(batch.dtype, batch.logits_of(unconditional, row), K, n, other);
      largest = DoublePasses(VQFAST_F64).guide(other, K, guidance, scores);
    }
    const double factor = std::min(1 / temperature, std::numeric_limits<double>::max());
    for (int64_t k = 0; k < n; ++k) scores[k] = (scores[k] - largest) * factor;
    if (!keep.any(K)) return 0;
    const double total = batch.isa.exp_wide_scores(scores, n, 0, 1, weights, sums);
    if (std::isfinite(total)) truncate(DoublePasses(VQFAST_F64), keep, K, scores, weights, sums, total);
    return 0;
  }

  void operator()(const Tile &tile, const Scratch &scratch) const {
    const int64_t n = batch.padded(), K = batch.K;
    double *scores = scratch.tile(0), *p = scratch.tile(1), *model = scratch.tile(2), *q = scratch.tile(3);
    const auto drawn = [&](int64_t r) { return !known || known[tile.first + r] < 0; };
    bool multiplies = false;
    for (int64_t r = 0; r < tile.count; ++r) {
      if (!drawn(r)) continue;
      multiplies = multiplies || !batch.at_data(tile.first + r);
      predict(tile.first + r, scores + r * n, scratch.row(0), scratch.row(1), scratch.sums());
    }
    if (batch.marginal) batch.evidence(tile, scratch, drawn, model, q);
    for (int64_t r = 0; r < tile.count; ++r) {
      if (!drawn(r)) {
        std::fill(p + r * n, p + (r + 1) * n, 0);
        continue;
      }
      const double largest = batch.marginal ? batch.isa.subtract_logs(scores + r * n, q + r * n, n) : 0;
      batch.isa.exp_wide_scores(scores + r * n, n, largest, 1, p + r * n, scratch.sums());
    }
    if (multiplies) batch.multiply(p, tile.forward, scratch, model);
    for (int64_t r = 0; r < tile.count; ++r) {
      const int64_t row = tile.first + r;
      const double quantile = uniform(philox(key[0], key[1], row, 0).first);
      double *weights = scratch.row(0), *sums = scratch.sums();
      if (!drawn(r)) {
        const double *given = batch.prior(row, known[row]);
        x_s[row] = locate(given, sums, K, quantile * DoublePasses(VQFAST_F64).sum(given, K, sums));
        continue;
      }
      const bool at_data = batch.at_data(row);
      const double total = batch.isa.weigh_posterior(batch.likelihood(row), (at_data ? scores : model) + r * n, at_data,
                                                     K, n, weights, sums);
      x_s[row] = total == total ? locate(weights, sums, K, quantile * total) : batch.x_t[row];
    }
  }
};

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_matrix_product(const double *rows, int64_t R, const double *matrix, int64_t K, int transpose,
                                         double *out) {
  const Kernels &isa = kernels();
  const int64_t n = (K + isa.matrix_panel - 1) / isa.matrix_panel * isa.matrix_panel, panels = n / isa.matrix_panel;
  const int64_t height = isa.matrix_rows, tiles = (R + height - 1) / height;
  const Buffer<double> packed = buffer<double>(n * K);
  bool enough = (bool)packed;
#pragma omp parallel reduction(&& : enough) if (R * K * K > kParallelProducts)
  {
    const FlushSubnormals flush;
    const Buffer<double> values = buffer<double>(height * K), given = buffer<double>(height * n),
                         taken = buffer<double>(height * n);
    enough = enough && values && given && taken;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < panels; ++i)
      if (packed) isa.pack_matrix(matrix, K, transpose, i, i + 1, packed.get());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
      if (!enough) continue;
      const int64_t first = i * height, count = std::min(height, R - first);
      for (int64_t r = 0; r < height; ++r)
        if (r < count)
          std::copy(rows + (first + r) * K, rows + (first + r + 1) * K, given.get() + r * n);
        else
          std::fill(given.get() + r * n, given.get() + (r + 1) * n, 0);
      isa.multiply_rows(given.get(), packed.get(), K, n, values.get(), taken.get());
      for (int64_t r = 0; r < count; ++r)
        std::copy(taken.get() + r * n, taken.get() + r * n + K, out + (first + r) * K);
    }
  }
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}

extern "C" int vqfast_cpu_matrix_loss(vqfast_dtype dtype, const void *logits, const int64_t *x0, const int64_t *x_t,
                                      const int64_t *s, vqfast_step step, int64_t B, int64_t L, int64_t K,
                                      const double *scale, int marginal, double aux_weight, void *loss, void *grad) {
  if (dtype < VQFAST_F32 || dtype > VQFAST_F16) return VQFAST_BAD_DTYPE;
  const Loss tiles = {{dtype, logits, x_t, s, step, B, L, K, marginal != 0}, x0, scale, aux_weight, loss, grad};
  return tiles.batch.run(grad || marginal, tiles);
}

extern "C" int vqfast_cpu_matrix_sample(vqfast_dtype dtype, const void *logits, const void *unconditional,
                                        const int64_t *x_t, const int64_t *s, vqfast_step step, int64_t B, int64_t L,
                                        int64_t K, const int64_t *known, int marginal, double temperature,
                                        double guidance, int64_t top_k, double top_p, const int64_t *key,
                                        int64_t *x_s) {
  if (dtype < VQFAST_F32 || dtype > VQFAST_F16) return VQFAST_BAD_DTYPE;
  const Reverse tiles = {{dtype, logits, x_t, s, step, B, L, K, marginal != 0},
                         unconditional,
                         known,
                         temperature,
                         guidance,
                         {top_k, top_p},
                         key,
                         x_s};
  return tiles.batch.run(marginal, tiles);
}
