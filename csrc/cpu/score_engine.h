// One way to score codes against rows: a number format, how it is packed, the loops over it.
#pragma once

#include <stdint.h>

#include "vqfast.h"

namespace vqfast {

constexpr int kMostTogether = 64;  // vectors of a tile or a panel, whatever the engine

// Squared norms of one packed vector, in float64: as packed, before the rounding to the format, and of the difference.
// Any of them is NaN or infinite if a component was.
struct PackedNorm {
  double rounded, exact, residual;
};

struct ScoreEngine {
  const char *name;    // "float32", "tiles" or "bfloat16"
  int lanes;           // of a vector of scores
  int tile_rows;       // rows that are scored together
  int panel_codes;     // codes that are packed together: 2 lanes
  int element_size;    // bytes of a packed value
  int feature_block;   // features are padded with zeros to a multiple of this
  int least_features;  // with fewer the float32 engine is taken to be faster, where neither was measured

  // Packs scale (v - mean) of n vectors of D features side by side, n <= tile_rows or panel_codes; the places after
  // them are zero. Without a mean, each vector is scaled by a power of two of its own, that of binary_scale.h.
  void (*pack_tile)(vqfast_dtype dtype, const void *const *vectors, int64_t n, int64_t D, const double *mean,
                    double scale, void *tile, PackedNorm *norms);
  void (*pack_panel)(vqfast_dtype dtype, const void *const *vectors, int64_t n, int64_t D, const double *mean,
                     double scale, void *panel, PackedNorm *norms);

  // A tile against n_panels panels, `group` of them at a time (the last time fewer): the largest score that each lane
  // of each row meets in a group, maxima[row * stride + group * lanes + lane]. Two vectors of `lanes` codes make a
  // panel, so that a lane of a group stands for 2 * group codes, `lanes` apart.
  void (*score)(const void *tile, const void *panels, const float *bias, int64_t D, int64_t n_panels, int64_t group,
                int64_t stride, float *maxima);

  // What a thread must do before it scores and after; `saved` is 64 bytes of its own. Null where there is nothing.
  void (*begin)(void *saved);
  void (*end)(const void *saved);

  int64_t padded(int64_t D) const { return (D + feature_block - 1) / feature_block * feature_block; }
  int64_t tile_bytes(int64_t D) const { return padded(D) * tile_rows * element_size; }
  int64_t panel_bytes(int64_t D) const { return padded(D) * panel_codes * element_size; }
};

}  // namespace vqfast
