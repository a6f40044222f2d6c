// Codebook lookup with its error and gradient, and the counts and sums of each code.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "convert.h"
#include "dispatch.h"
#include "gather.h"
#include "pages.h"
#include "vqfast.h"

namespace vqfast {
namespace {

constexpr int64_t kTileRows = kMostTogether;

double accumulator_at(vqfast_dtype dtype, const void *values, int64_t i) {
  return dtype == VQFAST_F64 ? ((const double *)values)[i] : ((const float *)values)[i];
}

void set_accumulator(vqfast_dtype dtype, void *values, int64_t i, double value) {
  if (dtype == VQFAST_F64)
    ((double *)values)[i] = value;
  else
    ((float *)values)[i] = (float)value;
}

const char *row_at(const vqfast_rows &x, int64_t size, int64_t n) {
  const int64_t b = n < x.rows ? 0 : n / x.rows;
  return (const char *)x.data + (b * x.stride_batch + (n - b * x.rows) * x.stride_row) * size;
}

// Vectors of a view, a tile at a time: in place where their features lie side by side, else gathered.
class Tile {
 public:
  Tile(const vqfast_rows &x, int64_t D, int64_t size) : x_(x), D_(D), size_(size), in_place_(x.stride_feature == 1) {
    if (!in_place_) gathered_ = buffer<char>(kTileRows * gathered_pitch(D, size) * size);
  }
  bool ready() const { return in_place_ || gathered_; }

  void read(int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) rows_[i] = row_at(x_, size_, first + i);
    if (!in_place_) gather(size_, rows_, n, D_, x_.stride_feature, gathered_.get());
  }
  const void *operator[](int64_t i) const { return rows_[i]; }

 private:
  const vqfast_rows &x_;
  int64_t D_, size_;
  bool in_place_;
  Buffer<char> gathered_;
  const void *rows_[kTileRows];
};

// Where the vectors of each code are: order[begin[k]..begin[k + 1]) in their order (a stable counting sort).
struct Members {
  Buffer<int64_t> begin, order;
  int64_t largest = 0;

  bool sort(const int64_t *indices, int64_t N, int64_t K) {
    begin = buffer<int64_t>(K + 2);
    order = buffer<int64_t>(N);
    if (!begin || !order) return false;
    // Counted two places further on, so that filling moves each start to where it belongs.
    std::fill(begin.get(), begin.get() + K + 2, 0);
    for (int64_t n = 0; n < N; ++n)
      if (indices[n] >= 0) ++begin[indices[n] + 2];
    for (int64_t k = 2; k < K + 2; ++k) largest = std::max(largest, begin[k]), begin[k] += begin[k - 1];
    for (int64_t n = 0; n < N; ++n)
      if (indices[n] >= 0) order[begin[indices[n] + 1]++] = n;
    return true;
  }
};

struct Stats {
  vqfast_dtype dtype;
  vqfast_rows x;
  int64_t D, K;
  const int64_t *indices;
  const void *weights;
  void *counts, *sums;

  double weight(int64_t n) const { return weights ? accumulator_at(dtype, weights, n) : 1.0; }
};

// Codes first_code..end_code-1, features first..end-1. sum: scratch for them.
void sum_members(const Stats &s, const Members &members, int64_t first_code, int64_t end_code, int64_t first,
                 int64_t end, double *sum) {
  constexpr int64_t kTogether = 64, kAhead = 16;
  const int64_t last = members.begin[end_code];
  const Kernels &isa = kernels();
  const int64_t size = element_size(s.dtype);
  const void *rows[kTogether];
  double weights[kTogether];
  for (int64_t k = first_code; k < end_code; ++k) {
    std::fill(sum, sum + (end - first), 0.0);
    double count = 0;
    for (int64_t i = members.begin[k]; i < members.begin[k + 1]; i += kTogether) {
      const int64_t n = std::min(kTogether, members.begin[k + 1] - i);
      for (int64_t j = 0; j < n; ++j) {
        // The vectors of a code lie anywhere: their memory is asked for a few vectors ahead.
        if (i + j + kAhead < last) {
          const char *later = row_at(s.x, size, members.order[i + j + kAhead]) + first * size;
          prefetch(later, (end - first) * size);
        }
        rows[j] = row_at(s.x, size, members.order[i + j]) + first * size;
        count += weights[j] = s.weight(members.order[i + j]);
      }
      isa.add_rows(s.dtype, rows, weights, n, end - first, sum);
    }
    if (first == 0) set_accumulator(s.dtype, s.counts, k, count);
    if (s.dtype == VQFAST_F64)
      std::copy(sum, sum + (end - first), (double *)s.sums + k * s.D + first);
    else
      std::copy(sum, sum + (end - first), (float *)s.sums + k * s.D + first);
  }
}

// The first code that belongs to `part` of `parts` of about equal work, a vector and a code costing one each.
int64_t first_code_of(const Members &members, int64_t K, int64_t part, int64_t parts) {
  const int64_t goal = (members.begin[K] + K) * part / parts;
  int64_t low = 0, high = K;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (members.begin[middle] + middle < goal)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Features that lie side by side: each thread has codes of its own, or, where one code has most of the vectors,
// features of its own. The bits of a sum are the same in any division.
int sum_by_code(const Stats &s, int64_t N) {
  Members members;
  if (!members.sort(s.indices, N, s.K)) return VQFAST_OUT_OF_MEMORY;
  const int64_t parts = N * s.D + s.K * s.D > kParallelElements ? omp_get_max_threads() : 1;
  const bool by_feature = 2 * members.largest * parts > 3 * (N + s.K) && s.D >= 16 * parts;
  Buffer<double> sums = buffer<double>(parts * (s.D + kCacheLine));
  if (!sums) return VQFAST_OUT_OF_MEMORY;
#pragma omp parallel for schedule(static, 1) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    double *sum = sums.get() + part * (s.D + kCacheLine);
    if (by_feature)
      sum_members(s, members, 0, s.K, s.D * part / parts, s.D * (part + 1) / parts, sum);
    else
      sum_members(s, members, first_code_of(members, s.K, part, parts), first_code_of(members, s.K, part + 1, parts), 0,
                  s.D, sum);
  }
  return VQFAST_OK;
}

// Features that lie apart (channel-first): some of them at a time for all vectors, which are read in their order.
int sum_by_feature(const Stats &s, int64_t N) {
  constexpr int64_t kTableBytes = 512 << 10, kFewest = 8, kMost = 64;  // of sums; features at a time
  const Kernels &isa = kernels();
  const int64_t size = element_size(s.dtype), fit = kTableBytes / (s.K * (int64_t)sizeof(double));
  const int64_t fair = (s.D + omp_get_max_threads() - 1) / omp_get_max_threads();
  const int64_t features = std::clamp(std::min(fit, fair) / kFewest * kFewest, kFewest, kMost);
  const int64_t blocks = (s.D + features - 1) / features;
  bool enough = true;
#pragma omp parallel reduction(&& : enough) if (N * s.D + s.K * s.D > kParallelElements)
  {
    const Buffer<double> sums = buffer<double>(s.K * features);
    enough = sums != nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t block = -1; block < blocks; ++block) {
      if (!sums) continue;
      std::fill(sums.get(), sums.get() + s.K * features, 0.0);
      if (block < 0) {
        for (int64_t n = 0; n < N; ++n)
          if (s.indices[n] >= 0) sums[s.indices[n]] += s.weight(n);
        for (int64_t k = 0; k < s.K; ++k) set_accumulator(s.dtype, s.counts, k, sums[k]);
        continue;
      }
      const int64_t first = block * features, width = std::min(features, s.D - first);
      vqfast_rows part = s.x;
      part.data = (const char *)s.x.data + first * s.x.stride_feature * size;
      Tile tile(part, width, size);
      if (!tile.ready()) {
        enough = false;
        continue;
      }
      for (int64_t n = 0; n < N; n += kTileRows) {
        const int64_t rows = std::min(kTileRows, N - n);
        tile.read(n, rows);
        for (int64_t i = 0; i < rows; ++i) {
          if (s.indices[n + i] < 0) continue;
          const void *row = tile[i];
          const double weight = s.weight(n + i);
          isa.add_rows(s.dtype, &row, &weight, 1, width, sums.get() + s.indices[n + i] * features);
        }
      }
      for (int64_t k = 0; k < s.K; ++k)
        for (int64_t f = 0; f < width; ++f)
          set_accumulator(s.dtype, s.sums, k * s.D + first + f, sums[k * features + f]);
    }
  }
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}

bool known_dtype(vqfast_dtype dtype) { return dtype >= VQFAST_F32 && dtype <= VQFAST_F16; }

}  // namespace
}  // namespace vqfast

using namespace vqfast;

extern "C" int vqfast_cpu_lookup(vqfast_dtype dtype, vqfast_rows x, int64_t D, const void *codebook, int64_t K,
                                 const int64_t *indices, void *quantized, void *error, int64_t *counts) {
  if (!known_dtype(dtype)) return VQFAST_BAD_DTYPE;
  const Kernels &isa = kernels();
  const int64_t N = x.batch * x.rows, size = element_size(dtype), bytes = D * size;
  std::fill(counts, counts + K, 0);
  prefer_large_pages(quantized, N * bytes);
  bool enough = true;
#pragma omp parallel reduction(&& : enough) if (N * D > kParallelElements)
  {
    Tile tile(x, D, size);
    enough = tile.ready();
    // One thread, while the others start on the rows: cheaper than a table of counts for each.
#pragma omp single nowait
    for (int64_t n = 0; n < N; ++n)
      if (indices[n] >= 0) ++counts[indices[n]];
#pragma omp for schedule(dynamic, 4)
    for (int64_t first = 0; first < N; first += kTileRows) {
      if (!tile.ready()) continue;
      const int64_t rows = std::min(kTileRows, N - first);
      tile.read(first, rows);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t n = first + i;
        char *out = (char *)quantized + n * bytes;
        if (indices[n] < 0) {
          std::memset(out, 0, bytes);
          set_accumulator(dtype, error, n, 0);
          continue;
        }
        const char *code = (const char *)codebook + indices[n] * bytes;
        std::memcpy(out, code, bytes);
        set_accumulator(dtype, error, n, isa.squared_error(dtype, tile[i], code, D));
      }
    }
  }
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}

extern "C" int vqfast_cpu_lookup_backward(vqfast_dtype dtype, vqfast_rows grad_quantized, const void *grad_error,
                                          vqfast_rows x, int64_t D, const void *codebook, int64_t,
                                          const int64_t *indices, void *grad_x) {
  if (!known_dtype(dtype)) return VQFAST_BAD_DTYPE;
  const Kernels &isa = kernels();
  const int64_t N = x.batch * x.rows, size = element_size(dtype), bytes = D * size;
  prefer_large_pages(grad_x, N * bytes);
  bool enough = true;
#pragma omp parallel reduction(&& : enough) if (N * D > kParallelElements)
  {
    Tile tile(x, D, size), grad_tile(grad_quantized, D, size);
    const bool ready = tile.ready() && grad_tile.ready();
    enough = ready;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < N; first += kTileRows) {
      if (!ready) continue;
      const int64_t rows = std::min(kTileRows, N - first);
      tile.read(first, rows);
      grad_tile.read(first, rows);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t n = first + i;
        char *out = (char *)grad_x + n * bytes;
        if (indices[n] < 0)
          std::memset(out, 0, bytes);
        else
          isa.lookup_grad(dtype, {grad_tile[i], 1, 0, 0}, 2 * accumulator_at(dtype, grad_error, n), tile[i],
                          (const char *)codebook + indices[n] * bytes, D, out);
      }
    }
  }
  return enough ? VQFAST_OK : VQFAST_OUT_OF_MEMORY;
}

extern "C" int vqfast_cpu_codebook_stats(vqfast_dtype dtype, vqfast_rows x, int64_t D, const int64_t *indices,
                                         const void *weights, int64_t K, void *counts, void *sums) {
  if (!known_dtype(dtype)) return VQFAST_BAD_DTYPE;
  const int64_t N = x.batch * x.rows;
  const Stats stats = {dtype, x, D, K, indices, weights, counts, sums};
  return x.stride_feature == 1 ? sum_by_code(stats, N) : sum_by_feature(stats, N);
}
