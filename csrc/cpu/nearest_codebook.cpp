// Centring, scaling and packing of a codebook, and the facts that the bound on the error of its scores is made of.
#include "nearest_codebook.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "binary_scale.h"
#include "buffer.h"
#include "convert.h"

namespace vqfast {
namespace {

constexpr double kLargest = std::numeric_limits<double>::max();

// What is packed: the codebook, or its codes at unit length in float64.
struct Source {
  vqfast_dtype dtype;
  const char *data;
  int64_t D;

  const char *code(int64_t k) const { return data + k * D * element_size(dtype); }
};

// c / ||c|| in float64, off by less than (D + 8) 2^-53; zero where c is; NaN where c is not finite.
void unit_codes(const Codes &codes, double *units) {
  const int64_t K = codes.K, D = codes.D;
#pragma omp parallel for schedule(static) if (K * D > 1 << 16)
  for (int64_t k = 0; k < K; ++k) {
    double *unit = units + k * D, largest = 0, square = 0;
    with_element(codes.dtype, [&](auto *type) {
      const auto *c = (decltype(type))codes.code(k);
      for (int64_t d = 0; d < D; ++d) {
        unit[d] = (double)widen(c[d]);
        largest = !(std::fabs(unit[d]) <= largest) ? std::fabs(unit[d]) : largest;
        if (!std::isfinite(unit[d])) largest = std::numeric_limits<double>::infinity();
      }
    });
    if (!std::isfinite(largest)) {
      std::fill_n(unit, D, std::numeric_limits<double>::quiet_NaN());
      continue;
    }
    const double scale = scale_to_one(largest);
    for (int64_t d = 0; d < D; ++d) {
      unit[d] *= scale;
      square += unit[d] * unit[d];
    }
    const double norm = square > 0 ? std::sqrt(square) : 1;
    for (int64_t d = 0; d < D; ++d) unit[d] /= norm;
  }
}

// The centre and the scale: the mean over the finite values of each feature, and the power of two that brings the
// largest deviation to [1, 2). Neither has to be exact: the bound holds for any centre and any power of two. False: out
// of memory.
bool centre(const Codes &codes, const Source &source) {
  const int64_t K = codes.K, D = codes.D;
  // A number of parts that does not depend on that of the threads, so that the centre does not either.
  const int64_t n_parts = K * D > 1 << 16 ? 16 : 1, part = (K + n_parts - 1) / n_parts;
  const Buffer<double> memory = buffer<double>(4 * D * n_parts);
  if (!memory) return false;
  const auto ranges = [&](int64_t p) {
    double *at = memory.get() + 4 * D * p;
    return FeatureRanges{at, at + D, at + 2 * D, at + 3 * D};
  };
#pragma omp parallel for schedule(static) if (n_parts > 1)
  for (int64_t p = 0; p < n_parts; ++p) {
    const FeatureRanges r = ranges(p);
    std::fill_n(r.sum, 2 * D, 0.0);
    std::fill_n(r.least, D, kLargest);
    std::fill_n(r.largest, D, -kLargest);
    const int64_t first = std::min(p * part, K), n = std::min(part, K - first);
    codes.isa.feature_ranges(source.dtype, source.code(first), n, D, 1.0 / (double)K, r);
  }
  double widest = 0, magnitude = 0;
  for (int64_t d = 0; d < D; ++d) {
    double sum = 0, count = 0, least = kLargest, largest = -kLargest;
    for (int64_t p = 0; p < n_parts; ++p) {
      const FeatureRanges r = ranges(p);
      sum += r.sum[d];
      count += r.count[d];
      least = std::min(least, r.least[d]);
      largest = std::max(largest, r.largest[d]);
    }
    const double mean = codes.mean[d] = count > 0 ? sum * ((double)K / count) : 0.0;
    if (count == 0) continue;
    widest = std::max({widest, largest - mean, mean - least});
    magnitude = std::max({magnitude, largest, -least});
  }
  codes.facts->scale = scale_to_one(widest);
  codes.facts->largest = magnitude;
  return true;
}

}  // namespace

Codes::Codes(vqfast_dtype dtype, vqfast_metric metric, const void *codebook, int64_t K, int64_t D,
             const SearchPath &path, void *memory)
    : isa(kernels()),
      path(path),
      engine(*isa.engines[path.engine]),
      dtype(dtype),
      metric(metric),
      codebook((const char *)codebook),
      K(K),
      D(D) {
  char *at = (char *)memory;
  facts = (CodebookFacts *)at;
  mean = (double *)(at += cache_lines(sizeof(CodebookFacts)));
  bias = (float *)(at += cache_lines(D * 8));
  panels = at += cache_lines(n_panels() * engine.panel_codes * 4);
}

int64_t Codes::bytes(int64_t K, int64_t D, const SearchPath &path) {
  const Codes at_zero(VQFAST_F32, VQFAST_L2, nullptr, K, D, path, nullptr);
  return at_zero.panels - (char *)nullptr + cache_lines(at_zero.n_panels() * at_zero.engine.panel_bytes(D));
}

bool Codes::prepare() const {
  const int64_t width = engine.panel_codes;
  Source source = {dtype, codebook, D};
  Buffer<double> units;
  if (metric == VQFAST_COSINE) {
    units = buffer<double>(K * D);
    if (!units) return false;
    unit_codes(*this, units.get());
    source = {VQFAST_F64, (const char *)units.get(), D};
  }
  if (!centre(*this, source)) return false;

  const double scale = facts->scale;
  double rounded = 0, exact = 0, residual = 0;
  int64_t first_finite = K;
  bool enough = true;
#pragma omp parallel for schedule(static) reduction(max : rounded, exact, residual) reduction(min : first_finite) \
    reduction(&& : enough) if (K * D > 1 << 16)
  for (int64_t p = 0; p < n_panels(); ++p) {
    PackedNorm norms[kMostTogether];
    const void *vectors[kMostTogether];
    const int64_t first = p * width, n = std::min(width, K - first);
    char *panel = panels + p * engine.panel_bytes(D);
    for (int64_t i = 0; i < n; ++i) vectors[i] = source.code(first + i);
    engine.pack_panel(source.dtype, vectors, n, D, mean, scale, panel, norms);
    bool finite = true;
    for (int64_t i = 0; i < width; ++i) {
      const bool usable = i < n && std::isfinite(norms[i].rounded) && std::isfinite(norms[i].exact);
      bias[first + i] = !usable ? kNever : metric == VQFAST_L2 ? (float)(-0.5 * norms[i].exact) : 0.0f;
      finite &= i >= n || usable;
      if (!usable) continue;
      rounded = std::max(rounded, norms[i].rounded);
      exact = std::max(exact, norms[i].exact);
      residual = std::max(residual, norms[i].residual);
      first_finite = std::min(first_finite, first + i);
    }
    if (finite) continue;
    // A NaN in a code would make its score NaN, whatever its bias: the panel again, with zeros in place of such codes.
    const int64_t bytes = D * element_size(source.dtype);
    const Buffer<char> zeros = buffer<char>(bytes);
    if (!zeros) {
      enough = false;
      continue;
    }
    std::fill_n(zeros.get(), bytes, 0);
    for (int64_t i = 0; i < n; ++i)
      if (bias[first + i] == kNever) vectors[i] = zeros.get();
    engine.pack_panel(source.dtype, vectors, n, D, mean, scale, panel, norms);
  }
  // Unit codes are rounded before they are packed.
  const double unit_error = metric == VQFAST_COSINE ? scale * ((double)D + 8) * 0x1p-53 : 0;
  facts->rounded = std::sqrt(rounded);
  facts->exact = std::sqrt(exact) + unit_error;
  facts->residual = std::sqrt(residual) + unit_error;
  facts->half_square = metric == VQFAST_L2 ? 0.5 * exact : 0;
  facts->first = first_finite < K ? first_finite : 0;
  facts->engine = path.engine;
  return enough;
}

}  // namespace vqfast

using namespace vqfast;

extern "C" int64_t vqfast_cpu_nearest_prepare_bytes(int64_t heads, int64_t D, int64_t K) {
  SearchPath path;
  return choose_path(kManyRows, K, D, kAnyEngine, path) ? heads * Codes::bytes(K, D, path) : 0;
}

extern "C" int vqfast_cpu_nearest_prepare(vqfast_dtype dtype, vqfast_metric metric, int64_t heads, int64_t D,
                                          const void *codebook, int64_t K, void *prepared) {
  if (dtype < VQFAST_F32 || dtype > VQFAST_F16) return VQFAST_BAD_DTYPE;
  SearchPath path;
  if (!choose_path(kManyRows, K, D, kAnyEngine, path)) return VQFAST_BAD_SCORES;
  for (int64_t h = 0; h < heads; ++h) {
    const char *head = (const char *)codebook + h * K * D * element_size(dtype);
    const Codes codes(dtype, metric, head, K, D, path, (char *)prepared + h * Codes::bytes(K, D, path));
    if (!codes.prepare()) return VQFAST_OUT_OF_MEMORY;
  }
  return VQFAST_OK;
}
