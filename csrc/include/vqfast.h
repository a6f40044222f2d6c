/* The C interface of vqfast's compiled kernels: one launcher per op and device.
 *
 * Launchers take raw pointers and sizes, allocate nothing that the caller sees, and return VQFAST_OK or an error code.
 * A `rows` argument is a view (batch, rows, D) of vectors, its strides counted in elements; a flat array of N vectors
 * has batch 1. Every other array is contiguous. Empty inputs are allowed everywhere.
 *
 * CUDA launchers have the same arguments, then the device index and the stream (cudaStream_t); scratch memory comes
 * from the caller, of the size that the matching ..._scratch_bytes function gives. They set the device and restore it.
 */
#ifndef VQFAST_H
#define VQFAST_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  VQFAST_OK = 0,
  VQFAST_BAD_DTYPE = 1,
  VQFAST_OUT_OF_MEMORY = 2,
  VQFAST_OUT_OF_RANGE = 3, /* a value of the arguments; only the ops that say so look */
  VQFAST_BAD_SCORES = 4,   /* VQFAST_CPU_SCORES or VQFAST_CUDA_SCORES names no kind of scores */
  VQFAST_CUDA_ERROR = 1000 /* + cudaError_t */
};

typedef enum { VQFAST_F32 = 0, VQFAST_F64 = 1, VQFAST_BF16 = 2, VQFAST_F16 = 3 } vqfast_dtype;

typedef enum { VQFAST_L2 = 0, VQFAST_DOT = 1, VQFAST_COSINE = 2 } vqfast_metric;

typedef struct {
  const void *data;
  int64_t batch, rows;
  int64_t stride_batch, stride_row, stride_feature;
} vqfast_rows;

/* nearest: indices (N, heads) of the code with the least distance, largest product or largest cosine, ties to the
 * lowest index; codebook (heads, K, D), both of `dtype`. x is the view of head 0, the others follow at stride_head
 * elements. exact 0 leaves out what the scores cannot decide. mask (N, heads) bytes or null: where 0, the index is -1.
 * prepared: what ..._prepare wrote for this dtype, metric and codebook, or null. reranked, if not null, receives how
 * many rows the scores left open. */
int vqfast_cpu_nearest(vqfast_dtype dtype, vqfast_metric metric, int exact, vqfast_rows x, int64_t heads,
                       int64_t stride_head, int64_t D, const void *codebook, int64_t K, const uint8_t *mask,
                       const void *prepared, int64_t *indices, int64_t *reranked);

/* The packed codebook and the facts of its bound, for many searches: `prepared` has prepare_bytes, aligned to 64, and
 * is read by this process only (its layout is that of the path in use). 0 bytes: VQFAST_BAD_SCORES. */
int64_t vqfast_cpu_nearest_prepare_bytes(int64_t heads, int64_t D, int64_t K);
int vqfast_cpu_nearest_prepare(vqfast_dtype dtype, vqfast_metric metric, int64_t heads, int64_t D, const void *codebook,
                               int64_t K, void *prepared);

/* residual_nearest: indices (N, Q) of the codes nearest to what the stages before have left of each row, and their sum,
 * quantized (N, D) of `dtype`; what is left and the sum are rounded to `dtype` after each stage. codebooks: Q of (K,
 * D), stride_stage elements apart, 0 where all stages have the same. mask (N) bytes or null: where 0, the indices are
 * -1 and the sum 0. */
int vqfast_cpu_residual_nearest(vqfast_dtype dtype, vqfast_rows x, int64_t D, const void *codebooks, int64_t Q,
                                int64_t stride_stage, int64_t K, const uint8_t *mask, int64_t *indices,
                                void *quantized);

/* lookup: quantized (N, D) of `dtype`, error (N) float32 (float64 for F64), counts (K). indices[n] in -1..K-1. */
int vqfast_cpu_lookup(vqfast_dtype dtype, vqfast_rows x, int64_t D, const void *codebook, int64_t K,
                      const int64_t *indices, void *quantized, void *error, int64_t *counts);

/* lookup_backward: grad_x (N, D) of `dtype` = grad_quantized + 2 grad_error (x - codebook[indices]); 0 where -1. */
int vqfast_cpu_lookup_backward(vqfast_dtype dtype, vqfast_rows grad_quantized, const void *grad_error, vqfast_rows x,
                               int64_t D, const void *codebook, int64_t K, const int64_t *indices, void *grad_x);

/* codebook_stats: counts (K), sums (K, D) and weights (N), which may be null: float32 (float64 for F64). */
int vqfast_cpu_codebook_stats(vqfast_dtype dtype, vqfast_rows x, int64_t D, const int64_t *indices, const void *weights,
                              int64_t K, void *counts, void *sums);

/* A transition family. levels (T + 1, columns) float64: alpha_bar, and gamma_bar in a second column where the family
 * has a mask state, which is state K. noise (K) float64: the distribution of replaced codes; null for 1 / K each.
 * cumulative (K) float64: sums of noise up to each code, for the ops that draw; null with noise. */
typedef struct {
  const double *levels;
  int64_t T, columns;
  const double *noise, *cumulative;
} vqfast_levels;

/* Diffusion. x0, x_t, known, x_s (B, L); t, s (B); key[2]; all integers int64. */
int vqfast_cpu_q_sample(const int64_t *x0, const int64_t *t, vqfast_levels levels, int64_t B, int64_t L, int64_t K,
                        const int64_t *key, int64_t *x_t);

/* logits, grad_logits (B, L, K), log_p, grad (B, L, K + columns - 1), all contiguous of `dtype`. */
int vqfast_cpu_posterior(vqfast_dtype dtype, const void *logits, const int64_t *x_t, const int64_t *t, const int64_t *s,
                         vqfast_levels levels, int64_t B, int64_t L, int64_t K, int marginal, void *log_p);
int vqfast_cpu_posterior_backward(vqfast_dtype dtype, const void *grad, const void *logits, const int64_t *x_t,
                                  const int64_t *t, const int64_t *s, vqfast_levels levels, int64_t B, int64_t L,
                                  int64_t K, int marginal, void *grad_logits);

/* logits (B, L, K) contiguous of `dtype`; loss (B, L) float32 (float64 for F64); grad like logits, or null; scale
 * (B, L) float64 multiplies the gradient only, and a token whose scale is 0 is not read: loss and gradient 0. */
int vqfast_cpu_diffusion_loss(vqfast_dtype dtype, const void *logits, const int64_t *x0, const int64_t *x_t,
                              const int64_t *t, const int64_t *s, vqfast_levels levels, int64_t B, int64_t L, int64_t K,
                              const double *scale, int marginal, double aux_weight, void *loss, void *grad);

/* rows (R, K) of `dtype` *= scale[r * stride], float32 (float64 for F64); rows whose scale is 1 are not touched. */
int vqfast_cpu_scale_rows(vqfast_dtype dtype, void *rows, int64_t R, int64_t K, const void *scale, int64_t stride);

/* unconditional: like logits, or null; known (B, L) or null; top_k 0 and top_p 1 keep every code. */
int vqfast_cpu_p_sample(vqfast_dtype dtype, const void *logits, const void *unconditional, const int64_t *x_t,
                        const int64_t *t, const int64_t *s, vqfast_levels levels, int64_t B, int64_t L, int64_t K,
                        const int64_t *known, int marginal, double temperature, double guidance, int64_t top_k,
                        double top_p, const int64_t *key, int64_t *x_s);

/* A step of a chain through matrices: prior (K, K) of x_s given x_0, likelihood (K, K) of x_t (rows) given x_s
 * (columns), float64, one each for every sample that many elements after the one before: K K, or 0 where all samples
 * share it. transposed: of the prior and like it, on CUDA, where the gradient or the marginal rule asks for it; else
 * not read. */
typedef struct {
  const double *prior, *likelihood, *transposed;
  int64_t stride_prior, stride_likelihood;
} vqfast_step;

/* What the marginal rule takes q(x_t | x_0) for 0 below: products of smaller numbers leave the range of a double. */
#define VQFAST_LEAST_EVIDENCE 1e-290

/* out (R, K) = rows (R, K) matrix (K, K), or its transpose, float64; below the smallest normal number it is 0. */
int vqfast_cpu_matrix_product(const double *rows, int64_t R, const double *matrix, int64_t K, int transpose,
                              double *out);

/* As vqfast_cpu_diffusion_loss and vqfast_cpu_p_sample; where s (B) is 0 the prior is the identity. */
int vqfast_cpu_matrix_loss(vqfast_dtype dtype, const void *logits, const int64_t *x0, const int64_t *x_t,
                           const int64_t *s, vqfast_step step, int64_t B, int64_t L, int64_t K, const double *scale,
                           int marginal, double aux_weight, void *loss, void *grad);

int vqfast_cpu_matrix_sample(vqfast_dtype dtype, const void *logits, const void *unconditional, const int64_t *x_t,
                             const int64_t *s, vqfast_step step, int64_t B, int64_t L, int64_t K, const int64_t *known,
                             int marginal, double temperature, double guidance, int64_t top_k, double top_p,
                             const int64_t *key, int64_t *x_s);

/* Variable-length codes. values: rows are the B * Hf * Wf positions of the fine grid (vectors of D elements of
 * element_bytes each: 2, 4 or 8), Hf = 2^(num_grains-1) Hc; grains (B, Hc, Wc). packed (capacity, D), cu_seqlens
 * (B + 1), positions and grain_ids (capacity). Tokens beyond capacity are dropped. A grain out of range is an error
 * here; on CUDA it is brought into range. */
int vqfast_cpu_pack(int64_t element_bytes, vqfast_rows values, int64_t D, const int64_t *grains, int64_t B, int64_t Hc,
                    int64_t Wc, int64_t num_grains, int64_t region, int64_t capacity, void *packed, int32_t *cu_seqlens,
                    int64_t *positions, int64_t *grain_ids);

/* packed: T rows; grid (B, Hf, Wf, D). replicate 0: a value at the top left of what its code covers only. Tokens that
 * are out of range, or have another grain than their cell, are passed over; of two at one place the later counts. */
int vqfast_cpu_unpack(int64_t element_bytes, vqfast_rows packed, int64_t D, const int32_t *cu_seqlens,
                      const int64_t *positions, const int64_t *grain_ids, const int64_t *grains, int64_t B, int64_t Hc,
                      int64_t Wc, int64_t num_grains, int64_t replicate, void *grid);

/* grad: rows are the positions of the fine grid; grad_packed (T, D) of `dtype`. */
int vqfast_cpu_unpack_backward(vqfast_dtype dtype, vqfast_rows grad, int64_t D, const int32_t *cu_seqlens,
                               const int64_t *positions, const int64_t *grain_ids, int64_t T, const int64_t *grains,
                               int64_t B, int64_t Hc, int64_t Wc, int64_t num_grains, void *grad_packed);

/* Codes of a quantiser on the fine grid. features: rows are its positions, D elements of `dtype` each, that of a code
 * at the top left of what it covers; indices (B, Hf, Wf) in 0..K-1, equal over what a code covers; grains in range.
 * quantized (B, Hf, Wf, D) of `dtype`, error (B, Hf, Wf) float32 (float64 for F64), zero but at the top left; counts
 * (K). */
int vqfast_cpu_dynamic_lookup(vqfast_dtype dtype, vqfast_rows features, int64_t D, const void *codebook, int64_t K,
                              const int64_t *indices, const int64_t *grains, int64_t B, int64_t Hc, int64_t Wc,
                              int64_t num_grains, void *quantized, void *error, int64_t *counts);

/* grad_features (B, Hf, Wf, D) of `dtype`: at the top left of what a code covers the sum of grad_quantized over it,
 * plus 2 grad_error (x - code); else zero. grad_error (B, Hf, Wf) as `error`. */
int vqfast_cpu_dynamic_lookup_backward(vqfast_dtype dtype, vqfast_rows grad_quantized, const void *grad_error,
                                       vqfast_rows features, int64_t D, const void *codebook, const int64_t *indices,
                                       const int64_t *grains, int64_t B, int64_t Hc, int64_t Wc, int64_t num_grains,
                                       void *grad_features);

/* positions, grain_ids (B, L); grain (B); mask (B, V) of 0 and 1, V >= Hc Wc 4^(num_grains-1) + 3. A `grain` out of
 * range is an error here; on CUDA it is brought into range. */
int vqfast_cpu_position_mask(const int64_t *positions, const int64_t *grain_ids, const int64_t *grain, int64_t B,
                             int64_t L, int64_t Hc, int64_t Wc, int64_t num_grains, int64_t V, uint8_t *mask);

/* images (B, C, H, W) of `dtype`, C 1 or 3, strides in elements in that order; entropy (B, H / P, W / P) float32
 * (float64 for F64). bins >= 2 points from lowest to highest. */
int vqfast_cpu_grain_entropy(vqfast_dtype dtype, const void *images, int64_t B, int64_t C, int64_t H, int64_t W,
                             const int64_t *strides, int64_t P, int64_t bins, double sigma, double lowest,
                             double highest, void *entropy);

/* CUDA. ..._scratch writes how many bytes of device memory an op needs for these sizes on this device. */
int vqfast_cuda_nearest_scratch(int64_t N, int64_t D, int64_t K, int device, int64_t *bytes);

/* reranked, if not null, is device memory. Nothing is prepared: `prepared` is not read. */
int vqfast_cuda_nearest(vqfast_dtype dtype, vqfast_metric metric, int exact, vqfast_rows x, int64_t heads,
                        int64_t stride_head, int64_t D, const void *codebook, int64_t K, const uint8_t *mask,
                        const void *prepared, int64_t *indices, int64_t *reranked, void *scratch, int device,
                        void *stream);

int vqfast_cuda_lookup(vqfast_dtype dtype, vqfast_rows x, int64_t D, const void *codebook, int64_t K,
                       const int64_t *indices, void *quantized, void *error, int64_t *counts, int device, void *stream);

int vqfast_cuda_lookup_backward(vqfast_dtype dtype, vqfast_rows grad_quantized, const void *grad_error, vqfast_rows x,
                                int64_t D, const void *codebook, int64_t K, const int64_t *indices, void *grad_x,
                                int device, void *stream);

/* N < 2^31. */
int vqfast_cuda_codebook_stats_scratch(vqfast_dtype dtype, int64_t N, int64_t D, int64_t K, int64_t *bytes);
int vqfast_cuda_codebook_stats(vqfast_dtype dtype, vqfast_rows x, int64_t D, const int64_t *indices,
                               const void *weights, int64_t K, void *counts, void *sums, void *scratch, int device,
                               void *stream);

int vqfast_cuda_q_sample(const int64_t *x0, const int64_t *t, vqfast_levels levels, int64_t B, int64_t L, int64_t K,
                         const int64_t *key, int64_t *x_t, int device, void *stream);

int vqfast_cuda_posterior(vqfast_dtype dtype, const void *logits, const int64_t *x_t, const int64_t *t,
                          const int64_t *s, vqfast_levels levels, int64_t B, int64_t L, int64_t K, int marginal,
                          void *log_p, int device, void *stream);

int vqfast_cuda_posterior_backward(vqfast_dtype dtype, const void *grad, const void *logits, const int64_t *x_t,
                                   const int64_t *t, const int64_t *s, vqfast_levels levels, int64_t B, int64_t L,
                                   int64_t K, int marginal, void *grad_logits, int device, void *stream);

int vqfast_cuda_diffusion_loss(vqfast_dtype dtype, const void *logits, const int64_t *x0, const int64_t *x_t,
                               const int64_t *t, const int64_t *s, vqfast_levels levels, int64_t B, int64_t L,
                               int64_t K, const double *scale, int marginal, double aux_weight, void *loss, void *grad,
                               int device, void *stream);

int vqfast_cuda_scale_rows(vqfast_dtype dtype, void *rows, int64_t R, int64_t K, const void *scale, int64_t stride,
                           int device, void *stream);

int vqfast_cuda_p_sample(vqfast_dtype dtype, const void *logits, const void *unconditional, const int64_t *x_t,
                         const int64_t *t, const int64_t *s, vqfast_levels levels, int64_t B, int64_t L, int64_t K,
                         const int64_t *known, int marginal, double temperature, double guidance, int64_t top_k,
                         double top_p, const int64_t *key, int64_t *x_s, int device, void *stream);

/* K at most 1024. */
int vqfast_cuda_matrix_loss(vqfast_dtype dtype, const void *logits, const int64_t *x0, const int64_t *x_t,
                            const int64_t *s, vqfast_step step, int64_t B, int64_t L, int64_t K, const double *scale,
                            int marginal, double aux_weight, void *loss, void *grad, int device, void *stream);

int vqfast_cuda_matrix_sample(vqfast_dtype dtype, const void *logits, const void *unconditional, const int64_t *x_t,
                              const int64_t *s, vqfast_step step, int64_t B, int64_t L, int64_t K, const int64_t *known,
                              int marginal, double temperature, double guidance, int64_t top_k, double top_p,
                              const int64_t *key, int64_t *x_s, int device, void *stream);

/* Scratch of pack: B * num_grains * Hc + B int64; of unpack and its backward: B * Hf * Wf int64. */
int vqfast_cuda_pack(int64_t element_bytes, vqfast_rows values, int64_t D, const int64_t *grains, int64_t B, int64_t Hc,
                     int64_t Wc, int64_t num_grains, int64_t region, int64_t capacity, void *packed,
                     int32_t *cu_seqlens, int64_t *positions, int64_t *grain_ids, void *scratch, int device,
                     void *stream);

int vqfast_cuda_unpack(int64_t element_bytes, vqfast_rows packed, int64_t D, const int32_t *cu_seqlens,
                       const int64_t *positions, const int64_t *grain_ids, const int64_t *grains, int64_t B, int64_t Hc,
                       int64_t Wc, int64_t num_grains, int64_t replicate, void *grid, void *scratch, int device,
                       void *stream);

int vqfast_cuda_unpack_backward(vqfast_dtype dtype, vqfast_rows grad, int64_t D, const int32_t *cu_seqlens,
                                const int64_t *positions, const int64_t *grain_ids, int64_t T, const int64_t *grains,
                                int64_t B, int64_t Hc, int64_t Wc, int64_t num_grains, void *grad_packed, void *scratch,
                                int device, void *stream);

int vqfast_cuda_position_mask(const int64_t *positions, const int64_t *grain_ids, const int64_t *grain, int64_t B,
                              int64_t L, int64_t Hc, int64_t Wc, int64_t num_grains, int64_t V, uint8_t *mask,
                              int device, void *stream);

int vqfast_cuda_grain_entropy(vqfast_dtype dtype, const void *images, int64_t B, int64_t C, int64_t H, int64_t W,
                              const int64_t *strides, int64_t P, int64_t bins, double sigma, double lowest,
                              double highest, void *entropy, int device, void *stream);

#ifdef __cplusplus
}
#endif

#endif
