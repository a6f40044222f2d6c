// The loop bodies of every op, once per instruction set, and which set runs here.
#pragma once

#include <stdint.h>

#include "score_engine.h"
#include "vqfast.h"

namespace vqfast {

// Of a row r and a code c: sums over the features, in float64.
struct Products {
  double product, magnitude, square;  // of r c, |r c| and c^2
};

// Of the finite values of each of D features: the sum of their shares, how many they are, the least and the largest.
struct FeatureRanges {
  double *sum, *count, *least, *largest;
};

// Vectors that are added up: `edge` rows of `edge` each, so many elements from one to the next, and from row to row.
struct Square {
  const void *first;
  int64_t edge, column, row;
};

constexpr int kMostEngines = 3;

struct Kernels {
  const char *name;
  int lanes;

  // nearest_float32.h, then nearest_amx.h, nearest_bf16.h where there are such; nearest_path.h chooses. Null after the
  // last.
  const ScoreEngine *engines[kMostEngines];

  // nearest_ranges.h
  void (*feature_ranges)(vqfast_dtype dtype, const void *codes, int64_t n, int64_t D, double share,
                         const FeatureRanges &ranges);

  // nearest_decide.h
  float (*largest_score)(const float *scores, int64_t n, float least);
  int64_t (*find_scores)(const float *scores, int64_t n, float threshold, int32_t *found);
  void (*widen_row)(vqfast_dtype dtype, const void *row, int64_t D, double scale, double *wide);
  double (*distance)(vqfast_dtype dtype, const double *row, const void *code, double scale, int64_t D);
  Products (*products)(vqfast_dtype dtype, const double *row, const void *code, double scale, int64_t D);

  // codebook_rows.h
  double (*squared_error)(vqfast_dtype dtype, const void *x, const void *code, int64_t D);
  void (*lookup_grad)(vqfast_dtype dtype, const Square &grad, double slope, const void *x, const void *code, int64_t D,
                      void *out);
  void (*sum_square)(vqfast_dtype dtype, const Square &vectors, int64_t D, void *sum);
  void (*move_residual)(vqfast_dtype dtype, const void *code, int64_t D, void *rest, void *total);
  void (*add_rows)(vqfast_dtype dtype, const void *const *rows, const double *weights, int64_t n, int64_t D,
                   double *sums);

  // gather_rows.h
  void (*gather)(int64_t size, const void **vectors, int64_t n, int64_t D, int64_t stride_feature, void *to,
                 int64_t pitch);

  // diffusion_rows.h; n is K rounded up to whole vectors
  float (*load_scores)(vqfast_dtype dtype, const void *row, int64_t K, float *scores);
  double (*exp_scores)(float *scores, int64_t n, float largest, float factor, double *sums, const char *next,
                       int element_size);
  double (*log1p_scores)(const float *weights, int64_t n, float ratio, const float *noise, const float *inverse,
                         float *shares, double *curvature);
  void (*grad_scores)(float *weights, int64_t n, float base, float slope, const float *shares);
  void (*store_scores)(vqfast_dtype dtype, const float *scores, int64_t K, void *row, bool past_caches);
  void (*scale_row)(vqfast_dtype dtype, void *row, int64_t K, double scale);
  float (*guide_scores)(vqfast_dtype dtype, const void *row, int64_t K, float guidance, float *scores);
  int64_t (*count_scores)(const float *scores, int64_t n, float least);
  double (*mass_scores)(const float *scores, const float *weights, int64_t n, float least);
  void (*keep_scores)(float *scores, float *weights, int64_t n, float least);
  double (*sum_scores)(const float *weights, int64_t n, double *sums);

  // posterior_rows.h; n is K rounded up to whole vectors
  void (*mix_scores)(float *scores, int64_t n, float largest, float offset, const float *log_noise, float log_spread,
                     float shift);
  void (*share_scores)(const float *weights, float *grads, int64_t n, float spread, const float *noise, double *given,
                       double *moved);
  void (*subtract_scores)(const float *weights, float *grads, int64_t n, float by);

  // random_rows.h
  void (*random_rows)(uint64_t key0, uint64_t key1, uint64_t row, uint32_t draw, uint64_t *first, uint64_t *second);

  // entropy_bins.h
  void (*add_bins)(const double *grey, int64_t n, double lowest, double sigma, double step, double reach, int64_t bins,
                   double *density);

  // matrix_rows.h; n is K rounded up to whole panels
  int matrix_rows, matrix_panel;  // of a tile; columns of a panel
  void (*pack_matrix)(const double *matrix, int64_t K, bool transpose, int64_t first, int64_t end, double *panels);
  void (*multiply_rows)(const double *rows, const double *panels, int64_t K, int64_t n, double *tile, double *out);
  double (*load_wide_scores)(vqfast_dtype dtype, const void *row, int64_t K, int64_t n, double *scores);
  double (*exp_wide_scores)(const double *scores, int64_t n, double largest, double factor, double *weights,
                            double *sums);
  double (*subtract_logs)(double *scores, const double *q, int64_t n);
  double (*weigh_posterior)(const double *f, const double *model, bool logs, int64_t K, int64_t n, double *weights,
                            double *sums);
  double (*diverge)(const double *f, const double *truth, double *model, bool logs, int64_t K, int64_t n, double *first,
                    double *second, double *ratio);
};

constexpr int64_t kMostLanes = 16;
constexpr int64_t kMostMatrixRows = 12;

constexpr int64_t kRandomRows = 16;  // rows whose random bits random_rows makes together

constexpr int64_t kBlockCodes = 64;  // codes whose probabilities exp_scores sums up together

constexpr int64_t kParallelElements = 1 << 15;  // below, starting the threads costs more than they save

// The set in use: the widest that this processor has, or the one that VQFAST_ISA names (amx, avx512bf16,
// avx512, avx2, generic).
// If VQFAST_ISA names one that is unknown or that this processor lacks, isa_error() says so and the widest is used.
const Kernels &kernels();
const char *isa_error();

}  // namespace vqfast
