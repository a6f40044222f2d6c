// Exact nearest-code search: float32 scores, a bound on their error, float64 where the bound does not decide.
// kernels/nearest/README.md derives the bound; the lines that round are named there and marked here.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "convert.h"
#include "dispatch.h"
#include "exact_distance.h"
#include "vqfast.h"

namespace vqfast {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int64_t kPanelBytes = 512 << 10;  // of panels gone through at a time: they stay in the second-level cache
constexpr int64_t kChunkBytes = 192 << 10;  // of packed rows that share them

struct Free {
  void operator()(void *p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Null if there is no memory.
template <class T>
Buffer<T> buffer(int64_t n) {
  const size_t bytes = (std::max<int64_t>(n, 1) * sizeof(T) + 63) / 64 * 64;
  return Buffer<T>(static_cast<T *>(std::aligned_alloc(64, bytes)));
}

double value_at(vqfast_dtype dtype, const void *data, int64_t i) {
  double v = 0;
  with_element(dtype, [&](auto *type) { v = (double)widen(((decltype(type))data)[i]); });
  return v;
}

// The codebook as the score kernel reads it.
struct Codes {
  int64_t K, D, n_panels;
  Buffer<double> mean;       // (D)
  Buffer<float> panels;      // (n_panels, D, panel_codes)
  Buffer<float> bias;        // (n_panels * panel_codes): -1/2 ||c - mean||^2; kNever where there is no finite code
  double scale;              // power of two that brings the largest centred component near 1
  double largest_norm;       // max ||scale (c - mean)||, rounded codes
};

bool finite_code(vqfast_dtype dtype, const void *codebook, int64_t k, int64_t D) {
  for (int64_t d = 0; d < D; ++d)
    if (!std::isfinite(value_at(dtype, codebook, k * D + d))) return false;
  return true;
}

// Mean over the finite values of each feature, and the power of two that brings the largest deviation to [1, 2).
// Neither has to be exact: the score kernel's bound holds for any centre and any power of two.
template <class T>
void centre(const T *codebook, Codes &codes) {
  constexpr int64_t kBlock = 32;
  constexpr double kFinite = std::numeric_limits<double>::max();
  const int64_t K = codes.K, D = codes.D;
  const double share = 1.0 / (double)K;
  double largest = 0;
#pragma omp parallel for schedule(static) reduction(max : largest) if (K * D > 1 << 16)
  for (int64_t d0 = 0; d0 < D; d0 += kBlock) {
    const int64_t m = std::min(kBlock, D - d0);
    double mean[kBlock] = {}, count[kBlock] = {};
    for (int64_t k = 0; k < K; ++k)
      for (int64_t d = 0; d < m; ++d) {
        const double v = widen(codebook[k * D + d0 + d]);
        const bool finite = std::fabs(v) <= kFinite;
        mean[d] += finite ? v * share : 0.0;  // divided before the sum, which might overflow
        count[d] += finite;
      }
    for (int64_t d = 0; d < m; ++d) codes.mean[d0 + d] = mean[d] *= count[d] ? (double)K / count[d] : 0.0;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t d = 0; d < m; ++d) {
        const double v = std::fabs(widen(codebook[k * D + d0 + d]) - mean[d]);
        largest = v > largest && v <= kFinite ? v : largest;
      }
  }
  codes.scale = largest > 0 ? std::ldexp(1.0, std::clamp(-std::ilogb(largest), -1000, 1000)) : 1.0;
}

bool prepare(const Kernels &isa, vqfast_dtype dtype, const void *codebook, int64_t K, int64_t D, Codes &codes) {
  const int width = isa.panel_codes;
  codes.K = K, codes.D = D, codes.n_panels = (K + width - 1) / width;
  codes.mean = buffer<double>(D);
  codes.panels = buffer<float>(codes.n_panels * width * D);
  codes.bias = buffer<float>(codes.n_panels * width);
  if (!codes.mean || !codes.panels || !codes.bias) return false;
  with_element(dtype, [&](auto *type) { centre((decltype(type))codebook, codes); });

  double largest = 0;
#pragma omp parallel for schedule(static) reduction(max : largest) if (K * D > 1 << 16)
  for (int64_t p = 0; p < codes.n_panels; ++p) {
    double norm[64], exact_norm[64];
    const int64_t first = p * width, n = std::min<int64_t>(width, K - first);
    float *panel = codes.panels.get() + p * width * D;
    const int64_t size = dtype == VQFAST_F64 ? 8 : dtype == VQFAST_F32 ? 4 : 2;
    isa.pack(dtype, (const char *)codebook + first * D * size, D, 1, n, width, D, codes.mean.get(), codes.scale,
             panel, norm, exact_norm);
    for (int i = 0; i < width; ++i) {
      float *bias = codes.bias.get() + first + i;
      if (i < n && std::isfinite(norm[i]) && std::isfinite(exact_norm[i])) {
        *bias = (float)(-0.5 * exact_norm[i]);  // rounds: u
        largest = std::max(largest, norm[i]);
      } else {
        *bias = kNever;
        for (int64_t d = 0; d < D; ++d) panel[d * width + i] = 0;
      }
    }
  }
  codes.largest_norm = std::sqrt(largest);
  return true;
}

// B(x): no score differs from its real value by more. norm = ||x^||, the packed row. Infinite where a score may overflow.
double error_bound(const Codes &codes, double norm) {
  constexpr double u = 0x1p-24;
  const double steps = (double)codes.D + 4;
  const double gamma = steps * u / (1 - steps * u);
  const double C = codes.largest_norm;
  if (!(norm * C + C * C < 1e37)) return std::numeric_limits<double>::infinity();
  // The last factor covers that the norms themselves were rounded; the last term what underflows.
  return gamma * (norm * C + 0.5 * C * C) * (1 + 1e-6) + 0x1p-140 * steps * (1 + norm + C);
}

struct Row {
  vqfast_dtype dtype;
  const void *data;
  int64_t stride;
};

// The nearest of the codes whose score may be the largest, by exact distance; the lowest index among equals.
// scores: (K) float32 of this row, or null to compare every code.
int64_t decide(const Row &row, vqfast_dtype dtype, const void *codebook, const Codes &codes, const float *scores,
               double threshold) {
  int64_t winner = 0;
  Double2 least = {std::numeric_limits<double>::infinity(), 0};
  for (int64_t k = 0; k < codes.K; ++k) {
    if (codes.bias[k] == kNever && (scores || !finite_code(dtype, codebook, k, codes.D))) continue;
    if (scores && scores[k] < threshold) continue;
    Double2 distance = {0, 0};
    with_element(dtype, [&](auto *type) {
      const auto *x = (decltype(type))row.data;
      const auto *c = (decltype(type))codebook + k * codes.D;
      // A power of two: exact, and it keeps the squares of large float64 values from overflowing.
      for (int64_t d = 0; d < codes.D; ++d)
        distance = add_squared_difference(distance, codes.scale * widen(x[d * row.stride]), codes.scale * widen(c[d]));
    });
    if (distance < least) least = distance, winner = k;
  }
  return winner;
}

struct Search {
  const Kernels &isa;
  vqfast_dtype dtype;
  vqfast_rows x;
  const void *codebook;
  const Codes &codes;
  int64_t *indices;

  Row row(int64_t n) const {
    const int64_t size = dtype == VQFAST_F64 ? 8 : dtype == VQFAST_F32 ? 4 : 2;
    const int64_t b = n / x.rows, r = n % x.rows;
    return {dtype, (const char *)x.data + (b * x.stride_batch + r * x.stride_row) * size, x.stride_feature};
  }
};

// One thread's memory for a chunk of rows.
struct Scratch {
  Buffer<float> tiles, best, second, scores;
  Buffer<int32_t> index;
  Buffer<double> norm, exact_norm;
  std::vector<int64_t> open;  // rows that the scores do not decide

  bool allocate(const Kernels &isa, int64_t rows, int64_t D) {
    tiles = buffer<float>(rows * D);
    best = buffer<float>(rows * isa.lanes);
    second = buffer<float>(rows * isa.lanes);
    index = buffer<int32_t>(rows * isa.lanes);
    norm = buffer<double>(rows);
    exact_norm = buffer<double>(rows);
    return tiles && best && second && index && norm && exact_norm;
  }
};

void pack_rows(const Search &s, Scratch &m, int64_t first, int64_t n, const int64_t *rows) {
  const int width = s.isa.tile_rows;
  const int64_t D = s.codes.D;
  for (int64_t i = 0; i < n; i += width) {
    const int64_t count = std::min<int64_t>(width, n - i);
    const int64_t begin = rows ? rows[i] : first + i;
    // In one call where the tile's rows lie at one stride.
    const bool together = !rows && begin / s.x.rows == (begin + count - 1) / s.x.rows;
    if (together) {
      s.isa.pack(s.dtype, s.row(begin).data, s.x.stride_row, s.x.stride_feature, count, width, D,
                 s.codes.mean.get(), s.codes.scale, m.tiles.get() + i * D, m.norm.get() + i, m.exact_norm.get() + i);
      continue;
    }
    float *tile = m.tiles.get() + i * D;
    std::fill(tile, tile + width * D, 0.0f);
    Buffer<float> one = buffer<float>(D);
    for (int64_t j = 0; j < count; ++j) {
      const Row row = s.row(rows ? rows[i + j] : begin + j);
      s.isa.pack(s.dtype, row.data, 0, row.stride, 1, 1, D, s.codes.mean.get(), s.codes.scale, one.get(),
                 m.norm.get() + i + j, m.exact_norm.get() + i + j);
      for (int64_t d = 0; d < D; ++d) tile[d * width + j] = one[d];
    }
  }
}

bool all_finite(const Row &row, int64_t D) {
  for (int64_t d = 0; d < D; ++d)
    if (!std::isfinite(value_at(row.dtype, row.data, d * row.stride))) return false;
  return true;
}

// Scores every code against rows first..first+n-1 and settles those whose winner is certain; the rest go to m.open.
void first_pass(const Search &s, Scratch &m, int64_t first, int64_t n) {
  const int lanes = s.isa.lanes, width = s.isa.tile_rows;
  const int64_t D = s.codes.D, tiles = (n + width - 1) / width;
  pack_rows(s, m, first, n, nullptr);
  std::fill(m.best.get(), m.best.get() + tiles * width * lanes, kNever);
  std::fill(m.second.get(), m.second.get() + tiles * width * lanes, kNever);
  std::fill(m.index.get(), m.index.get() + tiles * width * lanes, 0);

  const int64_t part = std::max<int64_t>(1, kPanelBytes / (D * s.isa.panel_codes * 4));
  for (int64_t p = 0; p < s.codes.n_panels; p += part) {
    const int64_t n_panels = std::min(part, s.codes.n_panels - p);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t at = t * width * lanes;
      s.isa.score(m.tiles.get() + t * width * D, s.codes.panels.get() + p * s.isa.panel_codes * D,
                  s.codes.bias.get() + p * s.isa.panel_codes, D, n_panels, p * s.isa.panel_codes,
                  m.best.get() + at, m.second.get() + at, m.index.get() + at);
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    const float *best = m.best.get() + r * lanes, *second = m.second.get() + r * lanes;
    float top = best[0], next = second[0];
    int32_t at = m.index[r * lanes];
    for (int l = 1; l < lanes; ++l) {
      next = std::max({next, second[l], std::min(top, best[l])});
      if (best[l] > top) top = best[l], at = m.index[r * lanes + l];
    }
    const double bound = error_bound(s.codes, std::sqrt(m.norm[r]));
    // False as well where anything is NaN or infinite.
    if ((double)top - next > 2 * bound && std::isfinite(top))
      s.indices[first + r] = at;
    else
      m.open.push_back(first + r);
  }
}

// Decides the rows of m.open: their scores once more, then exact distances for the codes within 2B of the best.
void second_pass(const Search &s, Scratch &m) {
  const int width = s.isa.tile_rows;
  const int64_t D = s.codes.D, stride = s.codes.n_panels * s.isa.panel_codes;
  for (size_t i = 0; i < m.open.size(); i += width) {
    const int64_t n = std::min<int64_t>(width, m.open.size() - i);
    pack_rows(s, m, 0, n, m.open.data() + i);
    s.isa.score_all(m.tiles.get(), s.codes.panels.get(), s.codes.bias.get(), D, s.codes.n_panels, stride,
                    m.scores.get());
    for (int64_t r = 0; r < n; ++r) {
      const int64_t at = m.open[i + r];
      const Row row = s.row(at);
      if (!all_finite(row, D)) {
        s.indices[at] = 0;
        continue;
      }
      const float *scores = m.scores.get() + r * stride;
      const float top = *std::max_element(scores, scores + stride);
      const double bound = error_bound(s.codes, std::sqrt(m.norm[r]));
      const bool usable = std::isfinite(bound) && std::isfinite(top);
      s.indices[at] =
          decide(row, s.dtype, s.codebook, s.codes, usable ? scores : nullptr, (double)top - 2 * bound);
    }
  }
}

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_nearest(vqfast_dtype dtype, vqfast_rows x, int64_t D, const void *codebook, int64_t K,
                                  int64_t *indices, int64_t *reranked) {
  if (dtype < VQFAST_F32 || dtype > VQFAST_F16) return VQFAST_BAD_DTYPE;
  const Kernels &isa = kernels();
  const int64_t N = x.batch * x.rows, width = isa.tile_rows;
  if (reranked) *reranked = 0;
  if (N == 0) return VQFAST_OK;
  Codes codes;
  if (!prepare(isa, dtype, codebook, K, D, codes)) return VQFAST_OUT_OF_MEMORY;

  // Rows that share one trip through the panels: few enough to stay in cache, and at least four chunks a thread.
  const int64_t fair = (N / (4 * omp_get_max_threads()) + width - 1) / width;
  const int64_t tiles = std::max<int64_t>(1, std::min(kChunkBytes / (width * D * 4), fair));
  const int64_t chunk = tiles * width;
  int64_t total = 0;
  bool enough = true;
#pragma omp parallel reduction(+ : total) reduction(&& : enough) if (N * K * D > 1 << 18)
  {
    Scratch m;
    const Search s = {isa, dtype, x, codebook, codes, indices};
    const bool ready = m.allocate(isa, chunk, D);
    enough = ready;
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < N; first += chunk) {
      if (!ready) continue;
      m.open.clear();
      first_pass(s, m, first, std::min(chunk, N - first));
      if (m.open.empty()) continue;
      total += (int64_t)m.open.size();
      if (!m.scores) m.scores = buffer<float>(width * codes.n_panels * isa.panel_codes);
      if (!m.scores) {
        enough = false;
        continue;
      }
      second_pass(s, m);
    }
  }
  if (reranked) *reranked = total;
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}
