"""Loss of a step through matrices with its gradient, in Triton: three kernels, a float64 row a token between them.

The product with the prediction made on the way in; the divergence, a program a token; the product back with the
softmax's gradient on the way out. In one kernel, as csrc/cuda has it, the posterior's tiles would spill registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.fusion_triton import FUSED
from vqfast.kernels.matrix_sample.triton import (
    ROWS,
    code_of,
    evidence,
    launch_sizes,
    log_evidence,
    log_of,
    matrix_rows,
    scores_of,
    strided,
    widened,
)


@triton.jit
def _place(scale_ptr, L, tiles, ROWS: tl.constexpr):
    """Sample and rows of this program's tile; which of them are inside, and which count."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    within = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    rows = sample * L + within
    scale = tl.load(scale_ptr + rows, mask=within < L, other=0.0)
    return sample, rows, within < L, scale


@triton.jit
def _prediction(logits_ptr, evidence_ptr, rows, reads, k, K, largest, top):
    """(ROWS, codes): log p(x_0 = k) as the rule has it, up to a number a row."""
    scores = scores_of(logits_ptr, None, rows, reads, k, K, 1.0) - largest[:, None]
    if evidence_ptr is not None:
        scores -= log_evidence(evidence_ptr, rows, reads, k, K)
    return scores - top[:, None]


@triton.jit(do_not_specialize=["L", "K"])
def _product_kernel(
    logits_ptr, s_ptr, prior_ptr, evidence_ptr, scale_ptr, model_ptr, sums_ptr, L, K, tiles, stride_prior,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """model: p(x_0) times the prior, or at the data log p(x_0). sums: largest score, largest prediction, total."""
    sample, rows, inside, scale = _place(scale_ptr, L, tiles, ROWS)
    reads = scale != 0
    prior_ptr += sample * stride_prior
    k = tl.arange(0, BLOCK)
    at = rows[:, None] * K + k[None, :]
    written = inside[:, None] & (k[None, :] < K)
    scores = scores_of(logits_ptr, None, rows, reads, k, K, 1.0)
    largest = tl.max(scores, 1)
    total = tl.sum(tl.exp(scores - largest[:, None]), 1)
    top = tl.zeros((ROWS,), tl.float64)
    if evidence_ptr is not None:
        top = tl.max(_prediction(logits_ptr, evidence_ptr, rows, reads, k, K, largest, top), 1)
    tl.store(sums_ptr + 3 * rows, largest, mask=inside)
    tl.store(sums_ptr + 3 * rows + 1, top, mask=inside)
    tl.store(sums_ptr + 3 * rows + 2, total, mask=inside)
    if tl.load(s_ptr + sample) <= 0:
        log_p = _prediction(logits_ptr, evidence_ptr, rows, reads, k, K, largest, top)
        tl.store(model_ptr + at, log_p, mask=written)
    else:
        model = tl.zeros((ROWS, BLOCK), tl.float64)
        for start in range(0, K, CHUNK):
            codes = start + tl.arange(0, CHUNK)
            log_p = _prediction(logits_ptr, evidence_ptr, rows, reads, codes, K, largest, top)
            model = tl.dot(tl.exp(log_p), matrix_rows(prior_ptr, codes, k, K), model, out_dtype=tl.float64)
        tl.store(model_ptr + at, model, mask=written)


@triton.jit(do_not_specialize=["L", "K"])
def _divergence_kernel(
    logits_ptr, x0_ptr, x_t_ptr, s_ptr, prior_ptr, likelihood_ptr, scale_ptr, model_ptr, sums_ptr, loss_ptr,
    L, K, stride_prior, stride_likelihood, aux_weight: tl.float64, AUXILIARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's loss; its row of model becomes dKL / dmodel, or at the data dKL / dlog p(x_0)."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // L
    loss = tl.full((), 0.0, tl.float64)
    if tl.load(scale_ptr + row) != 0:
        k = tl.arange(0, BLOCK)
        inside = k < K
        at_data = tl.load(s_ptr + sample) <= 0
        x0, x_t = code_of(x0_ptr, row, True, K), code_of(x_t_ptr, row, True, K)
        model = tl.load(model_ptr + row * K + k, mask=inside, other=0.0)
        log_model = tl.where(at_data, tl.where(inside, model, float("-inf")), log_of(model))
        likelihood = tl.load(likelihood_ptr + sample * stride_likelihood + x_t * K + k, mask=inside, other=0.0)
        log_f = log_of(likelihood)
        log_true = log_of(tl.load(prior_ptr + sample * stride_prior + x0 * K + k, mask=inside, other=0.0))
        top_true, top_model = tl.max(log_f + log_true, 0), tl.max(log_f + log_model, 0)
        a, b = tl.exp(log_f + log_true - top_true), tl.exp(log_f + log_model - top_model)
        sum_true, sum_model = tl.sum(a, 0), tl.sum(b, 0)
        a, b = a / sum_true, b / sum_model
        # 0 log 0 = 0. A pair of x_0 and x_t that the chain cannot give is NaN, and stays it.
        mean = tl.sum(tl.where(a == 0, 0.0, a * (log_true - log_model)), 0)
        loss = mean + ((top_model - top_true) + (tl.log(sum_model) - tl.log(sum_true)))
        if AUXILIARY:
            margin = tl.load(logits_ptr + row * K + x0).to(tl.float64) - tl.load(sums_ptr + 3 * row)
            loss -= tl.full((), aux_weight, tl.float64) * (margin - tl.log(tl.load(sums_ptr + 3 * row + 2)))
        nothing = (model == 0) & (at_data == 0)
        slope = tl.where(nothing, 0.0, (b - a) / tl.where(nothing | at_data, 1.0, model))
        tl.store(model_ptr + row * K + k, slope, mask=inside)
    tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["L", "K"])
def _gradient_kernel(
    logits_ptr, x0_ptr, s_ptr, prior_ptr, evidence_ptr, scale_ptr, slope_ptr, sums_ptr, grad_ptr,
    L, K, tiles, stride_prior, aux_weight: tl.float64, AUXILIARY: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, rows, inside, scale = _place(scale_ptr, L, tiles, ROWS)
    reads = scale != 0
    prior_ptr += sample * stride_prior
    at_data = tl.load(s_ptr + sample) <= 0
    x0 = code_of(x0_ptr, rows, reads, K)
    largest = tl.load(sums_ptr + 3 * rows, mask=reads, other=0.0)
    top = tl.load(sums_ptr + 3 * rows + 1, mask=reads, other=0.0)
    total = tl.load(sums_ptr + 3 * rows + 2, mask=reads, other=1.0)
    j = tl.arange(0, BLOCK)
    slopes = tl.load(slope_ptr + rows[:, None] * K + j[None, :], mask=reads[:, None] & (j[None, :] < K), other=0.0)
    for start in range(0, K, CHUNK):
        codes = start + tl.arange(0, CHUNK)
        at = rows[:, None] * K + codes[None, :]
        if at_data:
            gradient = tl.load(slope_ptr + at, mask=reads[:, None] & (codes[None, :] < K), other=0.0)
        else:
            log_p = _prediction(logits_ptr, evidence_ptr, rows, reads, codes, K, largest, top)
            transposed = tl.trans(matrix_rows(prior_ptr, codes, j, K))
            gradient = tl.exp(log_p) * tl.dot(slopes, transposed, out_dtype=tl.float64)
        if AUXILIARY:
            own = tl.exp(scores_of(logits_ptr, None, rows, reads, codes, K, 1.0) - largest[:, None]) / total[:, None]
            here = (codes[None, :] == x0[:, None]).to(tl.float64)
            gradient += tl.full((), aux_weight, tl.float64) * (own - here)
        gradient = tl.where(reads[:, None], gradient * scale[:, None], 0.0)
        if grad_ptr.dtype.element_ty != tl.float64:
            gradient = gradient.to(tl.float32)  # to the half precisions there is no direct way
        tl.store(grad_ptr + at, gradient.to(grad_ptr.dtype.element_ty), mask=inside[:, None] & (codes[None, :] < K))


def matrix_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    s: Tensor,
    prior: Tensor,
    likelihood: Tensor,
    scale: Tensor,
    marginal: bool,
    aux_weight: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(x0.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    grad = logits.new_empty(logits.shape if with_grad else (0,))
    if loss.numel() == 0:
        return loss, grad
    B, L, K = logits.shape
    tiles = triton.cdiv(L, ROWS)
    (prior_rows, stride_prior), (likelihood_rows, stride_likelihood) = strided(prior), strided(likelihood)
    logits, x0, s, scale = widened(logits), x0.contiguous(), s.contiguous(), scale.contiguous()
    x_t = x_t.contiguous()
    given = evidence(x_t, prior, likelihood) if marginal else None
    model = logits.new_empty(logits.shape, dtype=torch.float64)
    sums = logits.new_empty((B * L, 3), dtype=torch.float64)
    sizes = launch_sizes(K)
    _product_kernel[(B * tiles,)](
        logits, s, prior_rows, given, scale, model, sums, L, K, tiles, stride_prior, **sizes, **FUSED
    )
    _divergence_kernel[(B * L,)](
        logits, x0, x_t, s, prior_rows, likelihood_rows, scale, model, sums, loss, L, K, stride_prior,
        stride_likelihood, aux_weight, AUXILIARY=aux_weight != 0, BLOCK=sizes["BLOCK"], num_warps=1, **FUSED,
    )  # fmt: skip
    if with_grad:
        _gradient_kernel[(B * tiles,)](
            logits, x0, s, prior_rows, given, scale, model, sums, grad, L, K, tiles, stride_prior, aux_weight,
            AUXILIARY=aux_weight != 0, **sizes, **FUSED,
        )  # fmt: skip
    return loss, grad
