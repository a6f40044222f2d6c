"""Loss of a step through matrices with its gradient, in Triton: see kernels/matrix_sample/triton.py for the tiles."""

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
)


@triton.jit(do_not_specialize=["L", "K"])
def _matrix_loss_kernel(
    logits_ptr, x0_ptr, x_t_ptr, s_ptr, prior_ptr, likelihood_ptr, evidence_ptr, scale_ptr, loss_ptr, grad_ptr,
    L, K, tiles, stride_prior, stride_likelihood, aux_weight: tl.float64,
    AUXILIARY: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    within = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside = within < L
    rows = sample * L + within
    prior_ptr += sample * stride_prior
    likelihood_ptr += sample * stride_likelihood
    at_data = tl.load(s_ptr + sample) <= 0
    scale = tl.load(scale_ptr + rows, mask=inside, other=0.0)
    reads = scale != 0
    x0 = code_of(x0_ptr, rows, reads, K)
    k = tl.arange(0, BLOCK)
    auxiliary = tl.full((), aux_weight, tl.float64)

    scores = scores_of(logits_ptr, None, rows, reads, k, K, 1.0)
    largest = tl.max(scores, 1)
    scores -= largest[:, None]
    total = tl.sum(tl.exp(scores), 1)
    loss = tl.zeros((ROWS,), tl.float64)
    if AUXILIARY:
        loss -= auxiliary * (tl.sum(tl.where(k[None, :] == x0[:, None], scores, 0.0), 1) - tl.log(total))
    top = tl.zeros((ROWS,), tl.float64)
    if evidence_ptr is not None:
        scores -= log_evidence(evidence_ptr, rows, reads, k, K, LEAST)
        top = tl.max(scores, 1)
        scores -= top[:, None]

    log_model = scores
    model = tl.zeros((ROWS, BLOCK), tl.float64)
    if at_data == 0:
        for start in range(0, K, CHUNK):
            codes = start + tl.arange(0, CHUNK)
            part = scores_of(logits_ptr, None, rows, reads, codes, K, 1.0) - largest[:, None]
            if evidence_ptr is not None:
                part -= log_evidence(evidence_ptr, rows, reads, codes, K, LEAST)
            model = tl.dot(tl.exp(part - top[:, None]), matrix_rows(prior_ptr, codes, k, K), model)
        log_model = log_of(model)
    log_f = log_of(matrix_rows(likelihood_ptr, code_of(x_t_ptr, rows, reads, K), k, K))
    log_true = log_of(matrix_rows(prior_ptr, x0, k, K))
    top_true, top_model = tl.max(log_f + log_true, 1), tl.max(log_f + log_model, 1)
    a = tl.exp(log_f + log_true - top_true[:, None])
    b = tl.exp(log_f + log_model - top_model[:, None])
    sum_true, sum_model = tl.sum(a, 1), tl.sum(b, 1)
    a /= sum_true[:, None]
    b /= sum_model[:, None]
    # 0 log 0 = 0. A pair of x_0 and x_t that the chain cannot give is NaN, and stays it.
    mean = tl.sum(tl.where(a == 0, 0.0, a * (log_true - log_model)), 1)
    loss += mean + ((top_model - top_true) + (tl.log(sum_model) - tl.log(sum_true)))
    tl.store(loss_ptr + rows, tl.where(reads, loss, 0.0).to(loss_ptr.dtype.element_ty), mask=inside)

    if grad_ptr is not None:
        slope = b - a
        if at_data:
            if AUXILIARY:
                own = tl.exp(scores_of(logits_ptr, None, rows, reads, k, K, 1.0) - largest[:, None]) / total[:, None]
                slope += auxiliary * (own - (k[None, :] == x0[:, None]).to(tl.float64))
            slope = tl.where(reads[:, None], slope * scale[:, None], 0.0)
            tl.store(
                grad_ptr + rows[:, None] * K + k[None, :],
                slope.to(grad_ptr.dtype.element_ty),
                mask=inside[:, None] & (k[None, :] < K),
            )
        else:
            per_model = tl.where(model == 0, 0.0, slope / tl.where(model == 0, 1.0, model))
            for start in range(0, K, CHUNK):
                codes = start + tl.arange(0, CHUNK)
                part = scores_of(logits_ptr, None, rows, reads, codes, K, 1.0) - largest[:, None]
                prediction = part
                if evidence_ptr is not None:
                    prediction -= log_evidence(evidence_ptr, rows, reads, codes, K, LEAST)
                back = tl.dot(per_model, tl.trans(matrix_rows(prior_ptr, codes, k, K)))
                gradient = tl.exp(prediction - top[:, None]) * back
                if AUXILIARY:
                    own = tl.exp(part) / total[:, None]
                    gradient += auxiliary * (own - (codes[None, :] == x0[:, None]).to(tl.float64))
                gradient = tl.where(reads[:, None], gradient * scale[:, None], 0.0)
                tl.store(
                    grad_ptr + rows[:, None] * K + codes[None, :],
                    gradient.to(grad_ptr.dtype.element_ty),
                    mask=inside[:, None] & (codes[None, :] < K),
                )


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
    _matrix_loss_kernel[(B * tiles,)](
        logits.contiguous(),
        x0.contiguous(),
        x_t.contiguous(),
        s.contiguous(),
        prior_rows,
        likelihood_rows,
        evidence(x_t, prior, likelihood) if marginal else None,
        scale.contiguous(),
        loss,
        grad if with_grad else None,
        L,
        K,
        tiles,
        stride_prior,
        stride_likelihood,
        aux_weight,
        AUXILIARY=aux_weight != 0,
        **launch_sizes(K),
        **FUSED,
    )
    return loss, grad
