// Exact nearest-code search: scores in low precision, a bound on their error, exact distances where the bound does not
// decide. kernels/nearest/README.md derives the bound; the lines that round are named there.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "buffer.h"
#include "convert.h"
#include "dispatch.h"
#include "exact_distance.h"
#include "vqfast.h"

namespace vqfast {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kPartBytes = 512 << 10;   // of panels gone through at a time: they stay in the second-level cache
constexpr int64_t kChunkBytes = 192 << 10;  // of packed rows that share them
constexpr int64_t kSecondPanels = 16;       // whose scores are kept while candidates are looked for

// The codebook as a score engine reads it.
struct Codes {
  const Kernels &isa;
  const ScoreEngine &engine;
  vqfast_dtype dtype;
  const char *codebook;
  int64_t K, D, n_panels;
  Buffer<double> mean;   // (D)
  Buffer<char> panels;   // n_panels of them
  Buffer<float> bias;    // one a code: -1/2 ||scale (c - mean)||^2; kNever after the last code and where c is not finite
  double scale = 1;      // power of two
  double rounded = 0;    // max ||c^||, the packed code
  double exact = 0;      // max ||scale (c - mean)||
  double residual = 0;   // max of the norm of their difference

  const void *code(int64_t k) const { return codebook + k * D * element_size(dtype); }
  int64_t padded_K() const { return n_panels * engine.panel_codes; }
};

// The centre and the scale: the mean over the finite values of each feature, and the power of two that brings the largest
// deviation to [1, 2). Neither has to be exact: the bound holds for any centre and any power of two.
void centre(Codes &codes) {
  constexpr int64_t kFeatures = 8;
  const int64_t K = codes.K, D = codes.D;
  double widest = 0;
#pragma omp parallel for schedule(static) reduction(max : widest) if (K * D > 1 << 16)
  for (int64_t d0 = 0; d0 < D; d0 += kFeatures) {
    const int m = (int)std::min(kFeatures, D - d0);
    double sum[kFeatures], count[kFeatures], least[kFeatures], largest[kFeatures];
    codes.isa.feature_ranges(codes.dtype, codes.codebook, K, D, d0, m, 1.0 / (double)K, sum, count, least, largest);
    for (int j = 0; j < m; ++j) {
      const double mean = codes.mean[d0 + j] = count[j] > 0 ? sum[j] * ((double)K / count[j]) : 0.0;
      if (count[j] > 0) widest = std::max({widest, largest[j] - mean, mean - least[j]});
    }
  }
  const bool usable = widest > 0 && std::isfinite(widest);
  codes.scale = usable ? std::ldexp(1.0, std::clamp(-std::ilogb(widest), -1000, 1000)) : 1.0;
}

bool prepare(Codes &codes) {
  const ScoreEngine &engine = codes.engine;
  const int64_t width = engine.panel_codes, K = codes.K, D = codes.D;
  codes.n_panels = (K + width - 1) / width;
  codes.mean = buffer<double>(D);
  codes.panels = buffer<char>(codes.n_panels * engine.panel_bytes(D));
  codes.bias = buffer<float>(codes.padded_K());
  if (!codes.mean || !codes.panels || !codes.bias) return false;
  centre(codes);

  double rounded = 0, exact = 0, residual = 0;
  bool enough = true;
#pragma omp parallel for schedule(static) reduction(max : rounded, exact, residual) reduction(&& : enough) \
    if (K * D > 1 << 16)
  for (int64_t p = 0; p < codes.n_panels; ++p) {
    PackedNorm norms[64];
    const int64_t first = p * width, n = std::min(width, K - first);
    engine.pack_panel(codes.dtype, codes.code(first), D, 1, n, D, codes.mean.get(), codes.scale,
                      codes.panels.get() + p * engine.panel_bytes(D), norms);
    bool finite = true;
    for (int64_t i = 0; i < width; ++i) {
      const bool usable = i < n && std::isfinite(norms[i].rounded) && std::isfinite(norms[i].exact);
      codes.bias[first + i] = usable ? (float)(-0.5 * norms[i].exact) : kNever;
      finite &= i >= n || usable;
      if (!usable) continue;
      rounded = std::max(rounded, norms[i].rounded);
      exact = std::max(exact, norms[i].exact);
      residual = std::max(residual, norms[i].residual);
    }
    if (finite) continue;
    // A NaN in a code would make its score NaN, whatever its bias: the panel again, with zeros in place of such codes.
    const int64_t bytes = D * element_size(codes.dtype);
    const Buffer<char> kept = buffer<char>(n * bytes);
    if (!kept) {
      enough = false;
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      char *to = kept.get() + i * bytes;
      if (codes.bias[first + i] != kNever)
        std::copy_n((const char *)codes.code(first + i), bytes, to);
      else
        std::fill_n(to, bytes, 0);
    }
    engine.pack_panel(codes.dtype, kept.get(), D, 1, n, D, codes.mean.get(), codes.scale,
                      codes.panels.get() + p * engine.panel_bytes(D), norms);
  }
  codes.rounded = std::sqrt(rounded), codes.exact = std::sqrt(exact), codes.residual = std::sqrt(residual);
  return enough;
}

// B(x): no score of this row differs from its real value by more. Infinite where one might overflow.
double error_bound(const Codes &codes, const PackedNorm &row) {
  constexpr double u = 0x1p-24;
  const double steps = (double)codes.D + 4, gamma = steps * u / (1 - steps * u);
  const double x = std::sqrt(row.rounded), rest = std::sqrt(row.residual);
  if (!(x * codes.rounded + codes.exact * codes.exact < 1e37)) return kInfinity;
  const double sums = gamma * (x * codes.rounded + 0.5 * codes.exact * codes.exact);
  const double inputs = rest * codes.exact + x * codes.residual;
  // The factor covers that the norms themselves were rounded, the last term what underflows or is flushed to zero.
  return (sums + inputs) * (1 + 1e-6) + 0x1p-118 * steps * (1 + x + codes.exact);
}

struct Search {
  const Codes &codes;
  vqfast_rows x;
  int64_t *indices;

  const void *row(int64_t n) const {
    const int64_t at = n / x.rows * x.stride_batch + n % x.rows * x.stride_row;
    return (const char *)x.data + at * element_size(codes.dtype);
  }
};

// A row that the scores leave open, and the least score that its nearest code can have.
struct Open {
  int64_t row;
  float threshold;
};

// Scores of a row in the second pass: a cache line more than there are, or the rows of a tile would share a few cache sets.
int64_t second_stride(const ScoreEngine &engine) { return kSecondPanels * engine.panel_codes + 16; }

// One thread's memory for a chunk of rows. Allocation throws std::bad_alloc.
struct Scratch {
  Buffer<char> tiles;
  Buffer<float> best, second, scores;
  Buffer<int32_t> index, found;
  Buffer<double> wide;
  std::vector<double> distances;
  std::vector<PackedNorm> norms;
  std::vector<Open> open;
  std::vector<std::vector<int32_t>> candidates;  // of each open row

  void allocate(const Codes &codes, int64_t rows) {
    const ScoreEngine &engine = codes.engine;
    norms.resize(rows);
    best = buffer<float>(rows * engine.lanes);
    second = buffer<float>(rows * engine.lanes);
    index = buffer<int32_t>(rows * engine.lanes);
    if (!best || !second || !index) throw std::bad_alloc();
    tiles = buffer<char>(rows / engine.tile_rows * engine.tile_bytes(codes.D));  // last: it says that all is there
    if (!tiles) throw std::bad_alloc();
  }

  void allocate_second(const Codes &codes) {
    if (scores && found && wide) return;
    scores = buffer<float>(codes.engine.tile_rows * second_stride(codes.engine));
    found = buffer<int32_t>(kSecondPanels * codes.engine.panel_codes);
    wide = buffer<double>(codes.D);
    if (!scores || !found || !wide) throw std::bad_alloc();
  }
};

// The nearest of the codes found by exact distance, the lowest index among equals. float64 first; what it cannot separate, in
// twice float64.
int64_t nearest_of(const Codes &codes, const Search &s, int64_t row, const std::vector<int32_t> &found, double *wide,
                   double *distances) {
  const int64_t D = codes.D, n = (int64_t)found.size();
  const double scale = codes.scale;  // a power of two: exact, and it keeps squares from overflowing
  with_element(codes.dtype, [&](auto *type) {
    const auto *x = (decltype(type))s.row(row);
    for (int64_t d = 0; d < D; ++d) wide[d] = scale * (double)widen(x[d * s.x.stride_feature]);
  });
  double least = kInfinity;
  for (int64_t i = 0; i < n; ++i) {
    distances[i] = codes.isa.distance(codes.dtype, wide, codes.code(found[i]), scale, D);
    least = std::min(least, distances[i]);
  }
  const double limit = least * (1 + 4 * 0x1p-53 * ((double)D + 8));
  int64_t winner = -1, rivals = 0;
  for (int64_t i = 0; i < n; ++i)
    if (distances[i] <= limit && rivals++ == 0) winner = found[i];
  if (rivals <= 1) return std::max<int64_t>(winner, 0);

  Double2 closest = {kInfinity, 0};
  for (int64_t i = 0; i < n; ++i) {
    if (!(distances[i] <= limit)) continue;
    Double2 sum = {0, 0};
    with_element(codes.dtype, [&](auto *type) {
      const auto *c = (decltype(type))codes.code(found[i]);
      for (int64_t d = 0; d < D; ++d) sum = add_squared_difference(sum, wide[d], scale * (double)widen(c[d]));
    });
    if (sum < closest) closest = sum, winner = found[i];
  }
  return winner;
}

void pack_tile(const Search &s, int64_t first, int64_t n, char *tile, PackedNorm *norms) {
  const Codes &c = s.codes;
  c.engine.pack_tile(c.dtype, s.row(first), s.x.stride_row, s.x.stride_feature, n, c.D, c.mean.get(), c.scale, tile,
                     norms);
}

// Rows that do not lie at one stride from each other: gathered first.
void pack_gathered(const Search &s, const int64_t *rows, int64_t n, char *tile, PackedNorm *norms) {
  const Codes &c = s.codes;
  const Buffer<double> gathered = buffer<double>(n * c.D);
  if (!gathered) throw std::bad_alloc();
  for (int64_t i = 0; i < n; ++i)
    with_element(c.dtype, [&](auto *type) {
      const auto *x = (decltype(type))s.row(rows[i]);
      for (int64_t d = 0; d < c.D; ++d) gathered[i * c.D + d] = (double)widen(x[d * s.x.stride_feature]);
    });
  c.engine.pack_tile(VQFAST_F64, gathered.get(), c.D, 1, n, c.D, c.mean.get(), c.scale, tile, norms);
}

// Scores every code against rows first..first+n-1 and settles those whose winner is certain; the rest go to m.open.
void first_pass(const Search &s, Scratch &m, int64_t first, int64_t n) {
  const Codes &c = s.codes;
  const ScoreEngine &engine = c.engine;
  const int64_t lanes = engine.lanes, width = engine.tile_rows, tiles = (n + width - 1) / width;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = first + t * width, count = std::min(width, first + n - begin);
    char *tile = m.tiles.get() + t * engine.tile_bytes(c.D);
    if (begin / s.x.rows == (begin + count - 1) / s.x.rows) {
      pack_tile(s, begin, count, tile, &m.norms[t * width]);
    } else {
      int64_t rows[64];
      for (int64_t i = 0; i < count; ++i) rows[i] = begin + i;
      pack_gathered(s, rows, count, tile, &m.norms[t * width]);
    }
  }
  std::fill_n(m.best.get(), tiles * width * lanes, kNever);
  std::fill_n(m.second.get(), tiles * width * lanes, kNever);
  std::fill_n(m.index.get(), tiles * width * lanes, 0);

  const int64_t part = std::max<int64_t>(1, kPartBytes / engine.panel_bytes(c.D));
  for (int64_t p = 0; p < c.n_panels; p += part) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t at = t * width * lanes;
      engine.score(m.tiles.get() + t * engine.tile_bytes(c.D), c.panels.get() + p * engine.panel_bytes(c.D),
                   c.bias.get() + p * engine.panel_codes, c.D, std::min(part, c.n_panels - p),
                   p * engine.panel_codes, m.best.get() + at, m.second.get() + at, m.index.get() + at);
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    const float *best = m.best.get() + r * lanes, *second = m.second.get() + r * lanes;
    float top = best[0], next = second[0];
    int32_t at = m.index[r * lanes];
    for (int64_t l = 1; l < lanes; ++l) {
      next = std::max({next, second[l], std::min(top, best[l])});
      if (best[l] > top) top = best[l], at = m.index[r * lanes + l];
    }
    const double bound = error_bound(c, m.norms[r]);
    // False as well where anything is NaN or infinite: then every code with a finite bias is in question.
    if (std::isfinite(top) && (double)top - next > 2 * bound) {
      s.indices[first + r] = at;
    } else {
      const double least = (double)top - 2 * bound;
      const float rounded = (float)least;
      const bool known = std::isfinite(top) && std::isfinite(bound);
      m.open.push_back({first + r, known ? std::nextafter(rounded, kNever) : kNever});
    }
  }
}

bool all_finite(const Search &s, int64_t row) {
  bool finite = true;
  with_element(s.codes.dtype, [&](auto *type) {
    const auto *x = (decltype(type))s.row(row);
    for (int64_t d = 0; d < s.codes.D; ++d) finite &= std::isfinite((double)widen(x[d * s.x.stride_feature]));
  });
  return finite;
}

// Decides the rows of m.open: their scores once more, then the codes whose score reaches the threshold, by distance.
void second_pass(const Search &s, Scratch &m) {
  const Codes &c = s.codes;
  const ScoreEngine &engine = c.engine;
  const int64_t width = engine.tile_rows, n = (int64_t)m.open.size(), tiles = (n + width - 1) / width;
  std::vector<int64_t> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = m.open[i].row;
  for (int64_t t = 0; t < tiles; ++t)
    pack_gathered(s, &rows[t * width], std::min(width, n - t * width), m.tiles.get() + t * engine.tile_bytes(c.D),
                  m.norms.data());
  if ((int64_t)m.candidates.size() < n) m.candidates.resize(n);
  for (int64_t i = 0; i < n; ++i) m.candidates[i].clear();

  const int64_t stride = second_stride(engine);
  for (int64_t p = 0; p < c.n_panels; p += kSecondPanels) {
    const int64_t n_panels = std::min(kSecondPanels, c.n_panels - p), first = p * engine.panel_codes;
    for (int64_t t = 0; t < tiles; ++t) {
      engine.score_all(m.tiles.get() + t * engine.tile_bytes(c.D), c.panels.get() + p * engine.panel_bytes(c.D),
                       c.bias.get() + first, c.D, n_panels, stride, m.scores.get());
      for (int64_t i = t * width; i < std::min(n, (t + 1) * width); ++i) {
        if (m.open[i].threshold == kNever) continue;
        const int64_t count = c.isa.find_scores(m.scores.get() + (i - t * width) * stride,
                                                n_panels * engine.panel_codes, m.open[i].threshold, m.found.get());
        for (int64_t j = 0; j < count; ++j) m.candidates[i].push_back((int32_t)first + m.found[j]);
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    std::vector<int32_t> &candidates = m.candidates[i];
    s.indices[rows[i]] = 0;
    if (!all_finite(s, rows[i])) continue;
    if (m.open[i].threshold == kNever)
      for (int64_t k = 0; k < c.K; ++k)
        if (c.bias[k] != kNever) candidates.push_back((int32_t)k);
    m.distances.resize(candidates.size());
    s.indices[rows[i]] = nearest_of(c, s, rows[i], candidates, m.wide.get(), m.distances.data());
  }
}

const ScoreEngine &engine_for(const Kernels &isa, int64_t D) {
  return isa.bfloat16 && D >= isa.bfloat16->least_features ? *isa.bfloat16 : *isa.float32;
}

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_nearest(vqfast_dtype dtype, vqfast_rows x, int64_t D, const void *codebook, int64_t K,
                                  int64_t *indices, int64_t *reranked) {
  if (dtype < VQFAST_F32 || dtype > VQFAST_F16) return VQFAST_BAD_DTYPE;
  const int64_t N = x.batch * x.rows;
  if (reranked) *reranked = 0;
  if (N == 0) return VQFAST_OK;
  const Kernels &isa = kernels();
  const ScoreEngine &engine = engine_for(isa, D);
  Codes codes = {isa, engine, dtype, (const char *)codebook, K, D, 0, {}, {}, {}};
  if (!prepare(codes)) return VQFAST_OUT_OF_MEMORY;

  // Rows that share one trip through the panels: few enough to stay in cache, and at least four chunks a thread.
  const int64_t width = engine.tile_rows;
  const int64_t fair = (N / (4 * omp_get_max_threads()) + width - 1) / width;
  const int64_t chunk = width * std::max<int64_t>(1, std::min(kChunkBytes / engine.tile_bytes(D), fair));
  int64_t total = 0;
  bool enough = true;
#pragma omp parallel reduction(+ : total) reduction(&& : enough) if (N * K * D > 1 << 18)
  {
    Scratch m;
    const Search s = {codes, x, indices};
    alignas(64) char saved[64];
    if (engine.begin) engine.begin(saved);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < N; first += chunk) {
      // No exception may leave the parallel region: a lack of memory becomes the error code.
      try {
        if (!m.tiles) m.allocate(codes, chunk);
        m.open.clear();
        first_pass(s, m, first, std::min(chunk, N - first));
        if (m.open.empty()) continue;
        total += (int64_t)m.open.size();
        m.allocate_second(codes);
        second_pass(s, m);
      } catch (const std::bad_alloc &) {
        enough = false;
      }
    }
    if (engine.end) engine.end(saved);
  }
  if (reranked) *reranked = total;
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}
