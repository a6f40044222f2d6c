// Every loop body, and the table of them for the instruction set of the including file.
#include "codebook_rows.h"
#include "diffusion_rows.h"
#include "dispatch.h"
#include "entropy_bins.h"
#include "gather_rows.h"
#include "matrix_rows.h"
#include "nearest_decide.h"
#include "nearest_float32.h"
#include "nearest_ranges.h"
#include "posterior_rows.h"
#include "random_rows.h"

namespace vqfast::VQFAST_ISA {

extern const Kernels table;
const Kernels table = {
#define VQFAST_STRING_(x) #x
#define VQFAST_STRING(x) VQFAST_STRING_(x)
    VQFAST_STRING(VQFAST_ISA),
    kLanes,
    {&float32::engine},
    feature_ranges,
    largest_score,
    find_scores,
    widen_row,
    distance,
    products,
    squared_error,
    lookup_grad,
    sum_square,
    move_residual,
    add_rows,
    gather,
    load_scores,
    exp_scores,
    log1p_scores,
    grad_scores,
    store_scores,
    scale_row,
    guide_scores,
    count_scores,
    mass_scores,
    keep_scores,
    sum_scores,
    mix_scores,
    share_scores,
    subtract_scores,
    random_rows,
    add_bins,
    kMatrixRows,
    kMatrixPanel,
    pack_matrix,
    multiply_rows,
    load_wide_scores,
    exp_wide_scores,
    subtract_logs,
    weigh_posterior,
    diverge,
};

}  // namespace vqfast::VQFAST_ISA
