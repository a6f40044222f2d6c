// A codebook as a score engine reads it, in one block of memory: what vqfast_cpu_nearest_prepare leaves for many
// searches.
#pragma once

#include <limits>

#include "convert.h"
#include "dispatch.h"
#include "nearest_path.h"
#include "vqfast.h"

namespace vqfast {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// What the scores compare, and their bound reads. V_k is the code as the metric sees it: c_k for l2 and dot,
// c_k / ||c_k|| for cosine.
struct CodebookFacts {
  double scale;        // power of two
  double rounded;      // max ||c^||, the packed code
  double exact;        // max ||scale (V - mean)||
  double residual;     // max of the norm of their difference
  double half_square;  // max of the biases' magnitude
  double largest;      // magnitude of the largest finite component of the codebook
  int64_t first;       // lowest index of a finite code; 0 if there is none
  int engine;          // of Kernels::engines, for which the codes are packed
};

struct Codes {
  const Kernels &isa;
  const SearchPath path;
  const ScoreEngine &engine;
  vqfast_dtype dtype;
  vqfast_metric metric;
  const char *codebook;
  int64_t K, D;
  // The prepared memory.
  CodebookFacts *facts;
  double *mean;  // (D)
  float *bias;  // one a code: -1/2 ||scale (c - mean)||^2 for l2, else 0; kNever past the end and where c is not finite
  char *panels;  // n_panels() of them

  Codes(vqfast_dtype dtype, vqfast_metric metric, const void *codebook, int64_t K, int64_t D, const SearchPath &path,
        void *memory);

  static int64_t bytes(int64_t K, int64_t D, const SearchPath &path);  // of that memory, aligned to cache lines

  const void *code(int64_t k) const { return codebook + k * D * element_size(dtype); }
  int64_t n_panels() const { return (K + engine.panel_codes - 1) / engine.panel_codes; }
  // Where rows are centred too. The other metrics multiply the row as it is: x . mean is the same for every code.
  const double *row_mean() const { return metric == VQFAST_L2 ? mean : nullptr; }

  bool prepare() const;  // false: out of memory
};

}  // namespace vqfast
