"""Uniform diffusion loss in Triton: loss and gradient of a token in one program, one read of its logits.

With n = (1 - alpha_bar_s) / K and f = (1 - a) / K both posteriors are known up to their normalisers, Z_q of the true
one and Z of the model's, and

    KL = log(Z / Z_q) + sum_j q_j (log1p(A [j = x_0]) - log1p(A p_j)),   A = alpha_bar_s / n,

where q_j is the same number f n / Z_q for all j but x_0 and x_t. So a row needs log-sum-exp and one more sum; what
belongs to x_0 and x_t is a handful of scalars, taken in float64 because the KL is a small difference of them. The
elements are float32 (float64 for float64 logits), their sums float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Codes of one row that stay in registers between the passes (half as many in float64), 8 to a thread: more would spill.
# The blocks of a longer row are read again, from the cache.
_ONE_BLOCK = 4096
_BLOCK = 2048


@triton.jit
def _log1p(y):
    """log(1 + y) for y >= 0 to full relative precision: the rounding of 1 + y is put back to first order."""
    w = 1 + y
    return tl.log(w) + (y - (w - 1)) / w


@triton.jit
def _sums(odds, ordinary):
    """Over the ordinary codes: the sums of log(1 + A p) and of A p / (1 + A p), from odds = A p."""
    odds = tl.where(ordinary, odds, 0.0)
    return tl.sum(_log1p(odds).to(tl.float64), 0), tl.sum((odds / (1 + odds)).to(tl.float64), 0)


@triton.jit
def _gradient(weights, k, x0, x_t, p_factor, odds_factor, q, at_x0, at_x_t):
    odds = weights * odds_factor.to(weights.dtype)
    grad = weights * p_factor.to(weights.dtype) - q.to(weights.dtype) * (odds / (1 + odds))
    grad = tl.where(k == x_t, at_x_t.to(weights.dtype), grad)
    return tl.where(k == x0, at_x0.to(weights.dtype), grad)


@triton.jit(do_not_specialize=["L", "T", "K"])
def _diffusion_loss_kernel(
    logits_ptr,
    x0_ptr,
    x_t_ptr,
    t_ptr,
    s_ptr,
    alpha_bar_ptr,
    scale_ptr,
    loss_ptr,
    grad_ptr,
    L,
    T,
    K,
    stride_b,
    stride_l,
    aux_weight: tl.float64,
    WITH_GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    sample = row // L
    logits_ptr += sample * stride_b + (row % L) * stride_l
    grad_ptr += row * K
    block = tl.arange(0, BLOCK)
    # A token that does not count is not read, for its logits may be anything: as zeros they give a gradient of 0.
    width = tl.where(tl.load(scale_ptr + row) == 0, 0, K)
    absent = tl.where(width == 0, 0.0, float("-inf")).to(dtype)

    if ONE_BLOCK:
        logits = tl.load(logits_ptr + block, mask=block < width, other=absent).to(dtype)
        peak = tl.max(logits, 0)
        weights = tl.exp(logits - peak)
        total = tl.sum(weights.to(tl.float64), 0)
    else:
        peak = tl.full((), float("-inf"), dtype)
        total = tl.full((), 0.0, tl.float64)
        for start in range(0, K, BLOCK):
            logits = tl.load(logits_ptr + start + block, mask=start + block < width, other=absent).to(dtype)
            higher = tl.maximum(peak, tl.max(logits, 0))
            # A row that begins with -inf has no peak yet.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(peak - shift).to(tl.float64) + tl.sum(tl.exp(logits - shift).to(tl.float64), 0)
            peak = higher

    x0 = tl.minimum(tl.maximum(tl.load(x0_ptr + row), 0), K - 1)
    x_t = tl.minimum(tl.maximum(tl.load(x_t_ptr + row), 0), K - 1)
    same = tl.where(x0 == x_t, 1.0, 0.0).to(tl.float64)
    peak64 = peak.to(tl.float64)
    log_p_x0 = tl.load(logits_ptr + x0, mask=x0 < width, other=0.0).to(tl.float64) - peak64 - tl.log(total)
    p_x0 = tl.exp(log_p_x0)
    p_x_t = tl.exp(tl.load(logits_ptr + x_t, mask=x_t < width, other=0.0).to(tl.float64) - peak64 - tl.log(total))

    alpha_t = tl.load(alpha_bar_ptr + tl.minimum(tl.maximum(tl.load(t_ptr + sample), 0), T))
    alpha_s = tl.load(alpha_bar_ptr + tl.minimum(tl.maximum(tl.load(s_ptr + sample), 0), T))
    a = alpha_t / alpha_s
    f = (1 - a) / K
    n = (1 - alpha_s) / K
    noisy = n > 0
    # A = 0 stands for s = 0, where only x_0 has a true probability and its share r of the signal is 1.
    A = tl.where(noisy, alpha_s / tl.where(noisy, n, 1.0), 0.0)
    z_true = f + a * (alpha_s * same + n)
    z_model = f + a * (alpha_s * p_x_t + n)
    q = f * n / z_true
    q_x0 = (f + a * same) * (alpha_s + n) / z_true
    q_x_t = (1 - same) * (f + a) * n / z_true
    odds_factor = A / total

    if ONE_BLOCK:
        ordinary = (block != x0) & (block != x_t)
        sum_log, sum_share = _sums(weights * odds_factor.to(dtype), ordinary)
    else:
        sum_log = tl.full((), 0.0, tl.float64)
        sum_share = tl.full((), 0.0, tl.float64)
        for start in range(0, K, BLOCK):
            k = start + block
            logits = tl.load(logits_ptr + k, mask=k < width, other=absent).to(dtype)
            part_log, part_share = _sums(tl.exp(logits - peak) * odds_factor.to(dtype), (k != x0) & (k != x_t))
            sum_log += part_log
            sum_share += part_share

    # A step without noise (f = 0) can only stay where it is: nothing to predict, KL = 0.
    moves = f > 0
    at_x0 = tl.where(noisy, _log1p(A) - _log1p(A * p_x0), -log_p_x0)
    kl = tl.log(z_model / z_true) + q_x0 * at_x0 - q_x_t * _log1p(A * p_x_t) - q * sum_log
    # 0 * inf where x_0 has probability 0 and the auxiliary term is off.
    auxiliary = tl.where(aux_weight == 0, 0.0, -log_p_x0 * aux_weight)
    loss = tl.where(moves, kl, 0.0) + auxiliary
    loss = tl.where(total == total, loss, total)
    tl.store(loss_ptr + row, tl.where(tl.load(scale_ptr + row) == 0, 0.0, loss).to(loss_ptr.dtype.element_ty))

    if WITH_GRAD:
        scale = tl.load(scale_ptr + row)
        live = tl.where(moves, scale, 0.0)
        r_x0 = q_x0 * tl.where(noisy, A * p_x0 / (1 + A * p_x0), 1.0)
        r_x_t = q_x_t * (A * p_x_t / (1 + A * p_x_t))
        c = tl.where(moves, a * alpha_s * p_x_t / tl.where(moves, z_model, 1.0), 0.0)
        slope = live * tl.where(moves, r_x0 + r_x_t + q * sum_share - c, 0.0) + scale * aux_weight
        grad_x0 = p_x0 * slope - tl.where(moves, live * (r_x0 - same * c), 0.0) - scale * aux_weight
        grad_x_t = p_x_t * slope + tl.where(moves, live * (c - r_x_t), 0.0)
        p_factor = slope / total
        grad_q = tl.where(moves, live * q, 0.0)
        if ONE_BLOCK:
            grad = _gradient(weights, block, x0, x_t, p_factor, odds_factor, grad_q, grad_x0, grad_x_t)
            tl.store(grad_ptr + block, grad.to(grad_ptr.dtype.element_ty), mask=block < K)
        else:
            for start in range(0, K, BLOCK):
                k = start + block
                logits = tl.load(logits_ptr + k, mask=k < width, other=absent).to(dtype)
                weights = tl.exp(logits - peak)
                grad = _gradient(weights, k, x0, x_t, p_factor, odds_factor, grad_q, grad_x0, grad_x_t)
                tl.store(grad_ptr + k, grad.to(grad_ptr.dtype.element_ty), mask=k < K)


def uniform_diffusion_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    alpha_bar: Tensor,
    scale: Tensor,
    aux_weight: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    wide = logits.dtype == torch.float64
    loss = torch.empty(x0.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    grad = logits.new_empty(logits.shape if with_grad else (0,))
    if loss.numel() == 0:
        return loss, grad
    L, K = logits.shape[1:]
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    width = 2 if wide else 1
    one_block = K <= _ONE_BLOCK // width
    block = max(32, triton.next_power_of_2(K)) if one_block else _BLOCK // width
    _diffusion_loss_kernel[(loss.numel(),)](
        logits,
        x0.contiguous(),
        x_t.contiguous(),
        t.contiguous(),
        s.contiguous(),
        alpha_bar.contiguous(),
        scale.double().contiguous(),
        loss,
        grad,
        L,
        alpha_bar.shape[0] - 1,
        K,
        logits.stride(0),
        logits.stride(1),
        aux_weight,
        WITH_GRAD=with_grad,
        WIDE=wide,
        ONE_BLOCK=one_block,
        BLOCK=block,
        num_warps=max(block // 256, 1),
    )
    return loss, grad


@triton.jit(do_not_specialize=["K"])
def _scale_rows_kernel(rows_ptr, scale_ptr, K, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    scale = tl.load(scale_ptr + row).to(dtype)
    # The usual case, .backward() of the mean: a row times 1 is not touched.
    if scale != 1:
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            values = tl.load(rows_ptr + row * K + k, mask=k < K).to(dtype) * scale
            tl.store(rows_ptr + row * K + k, values.to(rows_ptr.dtype.element_ty), mask=k < K)


def scale_rows_(rows: Tensor, scale: Tensor) -> None:
    if rows.numel() == 0:
        return
    if not rows.is_contiguous():
        rows.mul_(scale[..., None])
        return
    K = rows.shape[-1]
    block = min(max(32, triton.next_power_of_2(K)), 4096)
    _scale_rows_kernel[(scale.numel(),)](
        rows,
        scale.contiguous(),
        K,
        WIDE=torch.float64 in (rows.dtype, scale.dtype),
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 8),
    )
