// A search in chunks of rows: scores in low precision, a bound on their error, exact distances of the few codes that
// the bound leaves. kernels/nearest/README.md derives the bound; the lines that round are named there.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "buffer.h"
#include "convert.h"
#include "dispatch.h"
#include "gather.h"
#include "nearest_codebook.h"
#include "nearest_exact.h"
#include "vqfast.h"

namespace vqfast {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kPartBytes = 512 << 10;   // of panels gone through at a time: they stay in the second-level cache
constexpr int64_t kChunkBytes = 192 << 10;  // of packed rows that share them
constexpr int64_t kStripPanels = 32;        // whose maxima are read back while they are in the first-level cache
constexpr int kMostCells = 12;
constexpr int64_t kParallelProducts = 1 << 18;  // below, starting the threads costs more than they save

// B(x): no score of this row differs from its real value by more. Infinite where one might overflow.
inline double error_bound(const Codes &codes, const PackedNorm &row) {
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

// The rows of one head. From one to the next, `step` further in the indices.
struct Rows {
  vqfast_dtype dtype;
  vqfast_rows x;
  int64_t *indices;
  int64_t step;

  const void *row(int64_t n) const {
    const int64_t b = n < x.rows ? 0 : n / x.rows;
    return (const char *)x.data + (b * x.stride_batch + (n - b * x.rows) * x.stride_row) * element_size(dtype);
  }
  int64_t &index(int64_t n) const { return indices[n * step]; }
};

inline bool finite(vqfast_dtype dtype, const void *vector, int64_t D) {
  bool all = true;
  with_element(dtype, [&](auto *type) {
    const auto *values = (decltype(type))vector;
    for (int64_t d = 0; d < D; ++d) all &= std::isfinite((double)widen(values[d]));
  });
  return all;
}

// What is known of a row while its scores come in. A cell is what one lane of a group of panels stands for: 2 * group
// codes, of which the scores tell the largest only.
struct Contest {
  double reach;  // how far below the best score that of the nearest code may lie; not finite where scores say nothing
  float best, least;  // the best score so far; the least that can still be the nearest code's
  int32_t winner;     // of the cells that had to make room; -1 for none
  int32_t n_cells;
  int32_t cells[kMostCells];
  float scores[kMostCells];

  void begin(double bound) {
    reach = 2 * bound;
    best = kNever;
    least = std::isfinite(bound) ? kNever : -kNever;
    winner = -1;
    n_cells = 0;
  }
  void raise(float top) {
    best = top;
    least = std::nextafter((float)(top - reach), kNever);
  }
  void drop_losers() {
    int32_t n = 0;
    for (int32_t i = 0; i < n_cells; ++i)
      if (scores[i] >= least) cells[n] = cells[i], scores[n++] = scores[i];
    n_cells = n;
  }
};

// One thread's memory for a chunk of rows. Allocation throws std::bad_alloc.
struct Scratch {
  Buffer<char> tiles;
  Buffer<char> gathered;  // rows whose features lie apart
  Buffer<float> maxima;
  Buffer<int32_t> found;
  Buffer<double> wide;
  std::vector<int64_t> rows;          // of the chunk; the next three are of each of these
  std::vector<const void *> vectors;  // in place, or gathered
  std::vector<PackedNorm> norms;
  std::vector<Contest> contests;
  std::vector<int32_t> codes;
  std::vector<Estimate> estimates;

  void allocate(const Codes &codes, int64_t rows, int64_t stride) {
    const ScoreEngine &engine = codes.engine;
    vectors.resize(rows);
    norms.resize(rows);
    contests.resize(rows);
    maxima = buffer<float>(engine.tile_rows * stride);
    found = buffer<int32_t>(stride);
    wide = buffer<double>(codes.D);
    if (!maxima || !found || !wide) throw std::bad_alloc();
    tiles = buffer<char>(rows / engine.tile_rows * engine.tile_bytes(codes.D));  // last: it says that all is there
    if (!tiles) throw std::bad_alloc();
  }
};

// One head's search: how its codebook is gone through, and what becomes of its rows.
class Search {
 public:
  Search(const Codes &codes, bool exact, const Rows &rows)
      : codes_(codes), engine_(codes.engine), exact_(exact), rows_(rows) {
    const int64_t fit = std::max<int64_t>(1, kPartBytes / engine_.panel_bytes(codes.D));
    group_ = std::min(codes.path.group, fit);
    strip_ = std::min(kStripPanels, fit) / group_ * group_;
    part_ = fit / strip_ * strip_;
    // A cache line more than there are, or the rows of a tile would share a few cache sets.
    stride_ = strip_ / group_ * engine_.lanes + 16;
  }

  int64_t stride() const { return stride_; }

  // Writes the indices of m.rows; returns how many of them the scores have left open.
  int64_t run(Scratch &m) const {
    pack(m);
    score(m);
    int64_t open = 0;
    for (size_t i = 0; i < m.rows.size(); ++i) open += decide(m, i);
    return open;
  }

 private:
  const Codes &codes_;
  const ScoreEngine &engine_;
  bool exact_;
  const Rows rows_;
  int64_t group_, strip_,
      part_;        // panels: whose maxima are one, read back at a time, gone through by a chunk at a time
  int64_t stride_;  // of the maxima of a row

  // Packs the rows, and opens their contests.
  void pack(Scratch &m) const {
    const int64_t width = engine_.tile_rows, n = m.rows.size();
    const int64_t together = kMostTogether / width * width;  // whole tiles, of which several share cache lines
    const int64_t apart = rows_.x.stride_feature, size = element_size(codes_.dtype);
    const int64_t bytes = gathered_pitch(codes_.D, size) * size;
    if (apart != 1 && !m.gathered) m.gathered = buffer<char>(m.vectors.size() * bytes);
    if (apart != 1 && !m.gathered) throw std::bad_alloc();
    for (int64_t i = 0; i < n; i += together) {
      const int64_t count = std::min(together, n - i);
      const void **vectors = &m.vectors[i];
      for (int64_t j = 0; j < count; ++j) vectors[j] = rows_.row(m.rows[i + j]);
      if (apart != 1) gather(size, vectors, count, codes_.D, apart, m.gathered.get() + i * bytes);
      for (int64_t j = 0; j < count; j += width)
        engine_.pack_tile(codes_.dtype, vectors + j, std::min(width, count - j), codes_.D, codes_.row_mean(),
                          codes_.facts->scale, m.tiles.get() + (i + j) / width * engine_.tile_bytes(codes_.D),
                          &m.norms[i + j]);
    }
    for (int64_t i = 0; i < n; ++i) {
      const double bound = error_bound(codes_, m.norms[i]);
      m.contests[i].begin(exact_ || !std::isfinite(bound) ? bound : 0);
    }
  }

  // Every code against every row.
  void score(Scratch &m) const {
    const int64_t n_panels = codes_.n_panels(), width = engine_.tile_rows, lanes = engine_.lanes, n = m.rows.size();
    for (int64_t part = 0; part < n_panels; part += part_)
      for (int64_t i = 0; i < n; i += width)
        for (int64_t p = part; p < std::min(part + part_, n_panels); p += strip_) {
          const int64_t panels = std::min(strip_, n_panels - p);
          engine_.score(m.tiles.get() + i / width * engine_.tile_bytes(codes_.D),
                        codes_.panels + p * engine_.panel_bytes(codes_.D), codes_.bias + p * engine_.panel_codes,
                        codes_.D, panels, group_, stride_, m.maxima.get());
          const int64_t n_maxima = (panels + group_ - 1) / group_ * lanes;
          for (int64_t r = 0; r < std::min(width, n - i); ++r)
            take(m, i + r, m.maxima.get() + r * stride_, n_maxima, p / group_ * lanes);
        }
  }

  // The maxima of cells first_cell.. of row m.rows[i].
  void take(Scratch &m, int64_t i, const float *maxima, int64_t n, int64_t first_cell) const {
    Contest &contest = m.contests[i];
    const float top = codes_.isa.largest_score(maxima, n, contest.least);
    if (top == kNever) return;
    if (top > contest.best) contest.raise(top);
    const int64_t count = codes_.isa.find_scores(maxima, n, contest.least, m.found.get());
    for (int64_t j = 0; j < count; ++j) {
      if (contest.n_cells == kMostCells) contest.drop_losers();
      if (contest.n_cells == kMostCells) settle(m, i);
      contest.cells[contest.n_cells] = (int32_t)first_cell + m.found[j];
      contest.scores[contest.n_cells++] = maxima[m.found[j]];
    }
  }

  // Compares the codes of a contest's cells by what they are in truth; one is left.
  void settle(Scratch &m, int64_t i) const {
    Contest &contest = m.contests[i];
    m.codes.clear();
    if (contest.winner >= 0) m.codes.push_back(contest.winner);
    for (int32_t c = 0; c < contest.n_cells; ++c) {
      const int64_t group = contest.cells[c] / engine_.lanes, lane = contest.cells[c] % engine_.lanes;
      const int64_t begin = group * group_ * engine_.panel_codes, end = begin + group_ * engine_.panel_codes;
      for (int64_t k = begin + lane; k < std::min(end, codes_.K); k += engine_.lanes)
        if (codes_.bias[k] != kNever) m.codes.push_back((int32_t)k);
    }
    std::sort(m.codes.begin(), m.codes.end());
    contest.winner = (int32_t)nearest_of(codes_, m.vectors[i], m.codes, m.wide.get(), m.estimates);
    contest.n_cells = 0;
  }

  // Writes the index of row m.rows[i]; true where the scores have left it open.
  bool decide(Scratch &m, int64_t i) const {
    Contest &contest = m.contests[i];
    int64_t &index = rows_.index(m.rows[i]);
    index = 0;
    // A row of zeros has the same product and the same cosine with every code.
    if (codes_.metric != VQFAST_L2 && m.norms[i].exact == 0) {
      index = codes_.facts->first;
      return false;
    }
    if (!std::isfinite(contest.reach)) {
      if (!finite(codes_.dtype, m.vectors[i], codes_.D)) return exact_;
      m.codes.clear();
      for (int64_t k = 0; k < codes_.K; ++k)
        if (codes_.bias[k] != kNever) m.codes.push_back((int32_t)k);
      index = nearest_of(codes_, m.vectors[i], m.codes, m.wide.get(), m.estimates);
      return exact_;
    }
    contest.drop_losers();
    const bool open = exact_ && (contest.n_cells > 1 || contest.winner >= 0);
    if (contest.n_cells > 0) settle(m, i);
    if (contest.winner >= 0) index = contest.winner;
    return open;
  }
};

// Calls body(scratch, first, n) for N rows in chunks, by all threads if the work is worth them; false: out of memory.
// `stride`: of a Search of these codes.
template <class Body>
bool in_chunks(const Codes &codes, int64_t stride, int64_t N, bool parallel, Body body) {
  const ScoreEngine &engine = codes.engine;
  const int64_t width = engine.tile_rows;
  // Rows that share one trip through the panels: few enough to stay in cache, and at least four chunks a thread.
  const int64_t fair = (N / (4 * omp_get_max_threads()) + width - 1) / width;
  const int64_t chunk = width * std::max<int64_t>(1, std::min(kChunkBytes / engine.tile_bytes(codes.D), fair));
  bool enough = true;
#pragma omp parallel reduction(&& : enough) if (parallel)
  {
    Scratch m;
    alignas(64) char saved[64];
    if (engine.begin) engine.begin(saved);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < N; first += chunk) {
      // No exception may leave the parallel region: a lack of memory becomes the error code.
      try {
        if (!m.tiles) m.allocate(codes, chunk, stride);
        body(m, first, std::min(chunk, N - first));
      } catch (const std::bad_alloc &) {
        enough = false;
      }
    }
    if (engine.end) engine.end(saved);
  }
  return enough;
}

}  // namespace vqfast
