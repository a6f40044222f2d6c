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
#include "nearest_codebook.h"
#include "nearest_exact.h"
#include "vqfast.h"

namespace vqfast {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kPartBytes = 512 << 10;   // of panels gone through at a time: they stay in the second-level cache
constexpr int64_t kChunkBytes = 192 << 10;  // of packed rows that share them
constexpr int64_t kSecondPanels = 16;       // whose scores are kept while candidates are looked for

// B(x): no score of this row differs from its real value by more. Infinite where one might overflow.
double error_bound(const Codes &codes, const PackedNorm &row) {
  constexpr double u = 0x1p-24;
  const CodebookFacts &c = *codes.facts;
  const double steps = (double)codes.D + 4, gamma = steps * u / (1 - steps * u);
  const double x = std::sqrt(row.rounded), rest = std::sqrt(row.residual);
  if (!(x * c.rounded + c.exact * c.exact < 1e37)) return kInfinity;
  const double sums = gamma * (x * c.rounded + c.half_square);
  const double inputs = rest * c.exact + x * c.residual;
  // The factor covers that the norms themselves were rounded, the last term what underflows or is flushed to zero.
  return (sums + inputs) * (1 + 1e-6) + 0x1p-118 * steps * (1 + x + c.exact);
}

// The rows of one head; its mask and indices lie `step` apart.
struct Search {
  const Codes &codes;
  bool exact;
  vqfast_rows x;
  int64_t step;
  const uint8_t *mask;
  int64_t *indices;

  const void *row(int64_t n) const {
    const int64_t at = n / x.rows * x.stride_batch + n % x.rows * x.stride_row;
    return (const char *)x.data + at * element_size(codes.dtype);
  }
  bool masked(int64_t n) const { return mask && !mask[n * step]; }
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
  std::vector<Estimate> estimates;
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

void pack_tile(const Search &s, int64_t first, int64_t n, char *tile, PackedNorm *norms) {
  const Codes &c = s.codes;
  c.engine.pack_tile(c.dtype, s.row(first), s.x.stride_row, s.x.stride_feature, n, c.D, c.row_mean(), c.facts->scale,
                     tile, norms);
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
  c.engine.pack_tile(VQFAST_F64, gathered.get(), c.D, 1, n, c.D, c.row_mean(), c.facts->scale, tile, norms);
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
  for (int64_t p = 0; p < c.n_panels(); p += part) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t at = t * width * lanes;
      engine.score(m.tiles.get() + t * engine.tile_bytes(c.D), c.panels + p * engine.panel_bytes(c.D),
                   c.bias + p * engine.panel_codes, c.D, std::min(part, c.n_panels() - p),
                   p * engine.panel_codes, m.best.get() + at, m.second.get() + at, m.index.get() + at);
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    int64_t &index = s.indices[(first + r) * s.step];
    if (s.masked(first + r)) {
      index = -1;
      continue;
    }
    const float *best = m.best.get() + r * lanes, *second = m.second.get() + r * lanes;
    float top = best[0], next = second[0];
    int32_t at = m.index[r * lanes];
    for (int64_t l = 1; l < lanes; ++l) {
      next = std::max({next, second[l], std::min(top, best[l])});
      if (best[l] > top) top = best[l], at = m.index[r * lanes + l];
    }
    const bool finite = std::isfinite(top);
    if (!s.exact) {
      index = finite ? at : 0;
      continue;
    }
    // A row of zeros has the same product and the same cosine with every code.
    if (c.metric != VQFAST_L2 && m.norms[r].exact == 0) {
      index = c.facts->first;
      continue;
    }
    const double bound = error_bound(c, m.norms[r]);
    // False as well where anything is NaN or infinite: then every code with a finite bias is in question.
    if (finite && (double)top - next > 2 * bound) {
      index = at;
    } else {
      const double least = (double)top - 2 * bound;
      const float rounded = (float)least;
      const bool known = finite && std::isfinite(bound);
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
  for (int64_t p = 0; p < c.n_panels(); p += kSecondPanels) {
    const int64_t n_panels = std::min(kSecondPanels, c.n_panels() - p), first = p * engine.panel_codes;
    for (int64_t t = 0; t < tiles; ++t) {
      engine.score_all(m.tiles.get() + t * engine.tile_bytes(c.D), c.panels + p * engine.panel_bytes(c.D),
                       c.bias + first, c.D, n_panels, stride, m.scores.get());
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
    int64_t &index = s.indices[rows[i] * s.step];
    index = 0;
    if (!all_finite(s, rows[i])) continue;
    if (m.open[i].threshold == kNever)
      for (int64_t k = 0; k < c.K; ++k)
        if (c.bias[k] != kNever) candidates.push_back((int32_t)k);
    index = nearest_of(c, s.row(rows[i]), s.x.stride_feature, candidates, m.wide.get(), m.estimates);
  }
}

// One head's rows; false: out of memory. Adds to `reranked`.
bool search(const Search &s, int64_t &reranked) {
  const Codes &codes = s.codes;
  const ScoreEngine &engine = codes.engine;
  const int64_t N = s.x.batch * s.x.rows;
  // Rows that share one trip through the panels: few enough to stay in cache, and at least four chunks a thread.
  const int64_t width = engine.tile_rows;
  const int64_t fair = (N / (4 * omp_get_max_threads()) + width - 1) / width;
  const int64_t chunk = width * std::max<int64_t>(1, std::min(kChunkBytes / engine.tile_bytes(codes.D), fair));
  int64_t total = 0;
  bool enough = true;
#pragma omp parallel reduction(+ : total) reduction(&& : enough) if (N * codes.K * codes.D > 1 << 18)
  {
    Scratch m;
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
  reranked += total;
  return enough;
}

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_nearest(vqfast_dtype dtype, vqfast_metric metric, int exact, vqfast_rows x, int64_t heads,
                                  int64_t stride_head, int64_t D, const void *codebook, int64_t K, const uint8_t *mask,
                                  const void *prepared, int64_t *indices, int64_t *reranked) {
  if (dtype < VQFAST_F32 || dtype > VQFAST_F16) return VQFAST_BAD_DTYPE;
  int64_t total = 0;
  if (reranked) *reranked = 0;
  if (x.batch * x.rows == 0) return VQFAST_OK;
  const int64_t bytes = Codes::bytes(K, D), size = element_size(dtype);
  const Buffer<char> own = prepared ? nullptr : buffer<char>(bytes);
  if (!prepared && !own) return VQFAST_OUT_OF_MEMORY;
  for (int64_t h = 0; h < heads; ++h) {
    // Only `prepare` writes to this memory.
    char *memory = prepared ? (char *)const_cast<void *>(prepared) + h * bytes : own.get();
    const Codes codes(dtype, metric, (const char *)codebook + h * K * D * size, K, D, memory);
    if (!prepared && !codes.prepare()) return VQFAST_OUT_OF_MEMORY;
    vqfast_rows rows = x;
    rows.data = (const char *)x.data + h * stride_head * size;
    if (!search({codes, exact != 0, rows, heads, mask ? mask + h : nullptr, indices + h}, total))
      return VQFAST_OUT_OF_MEMORY;
  }
  if (reranked) *reranked = total;
  return VQFAST_OK;
}
