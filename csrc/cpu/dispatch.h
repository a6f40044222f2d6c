// The loop bodies of every op, once per instruction set, and which set runs here.
#pragma once

#include <stdint.h>

#include "vqfast.h"

namespace vqfast {

struct Kernels {
  const char *name;
  int lanes;

  // nearest_score.h, nearest_pack.h
  int tile_rows;    // rows of x that are scored together
  int panel_codes;  // codes that are packed together
  void (*pack)(vqfast_dtype dtype, const void *rows, int64_t stride_row, int64_t stride_feature, int64_t n, int width,
               int64_t D, const double *mean, double scale, float *packed, double *norm, double *exact_norm);
  void (*score)(const float *tile, const float *panels, const float *bias, int64_t D, int64_t n_panels,
                int64_t first_code, float *best, float *second, int32_t *index);
  void (*score_all)(const float *tile, const float *panels, const float *bias, int64_t D, int64_t n_panels,
                    int64_t stride, float *scores);

  // codebook_rows.h
  double (*squared_error)(vqfast_dtype dtype, const void *x, const void *code, int64_t D);
  void (*lookup_grad)(vqfast_dtype dtype, const void *grad, double slope, const void *x, const void *code, int64_t D,
                      void *out);
  void (*add_rows)(vqfast_dtype dtype, const void *const *rows, const double *weights, int64_t n, int64_t D,
                   double *sums);

  // diffusion_rows.h; n is K rounded up to whole vectors
  float (*load_scores)(vqfast_dtype dtype, const void *row, int64_t K, float *scores);
  double (*exp_scores)(float *scores, int64_t n, float largest, float factor, double *sums, const char *next,
                       int element_size);
  double (*log1p_scores)(const float *weights, int64_t n, float ratio, float *shares, double *curvature);
  void (*grad_scores)(float *weights, int64_t n, float base, float slope, const float *shares);
  void (*store_scores)(vqfast_dtype dtype, const float *scores, int64_t K, void *row, bool past_caches);
  void (*scale_row)(vqfast_dtype dtype, void *row, int64_t K, double scale);
};

constexpr int64_t kBlockCodes = 64;  // codes whose probabilities exp_scores sums up together

// The set in use: the widest that this processor has, or the one that VQFAST_ISA names (avx512, avx2, generic).
// If VQFAST_ISA names one that is unknown or that this processor lacks, isa_error() says so and the widest is used.
const Kernels &kernels();
const char *isa_error();

}  // namespace vqfast
