"""Diffusion loss in Triton: loss and gradient of a token in one program, one read of its logits.

README.md derives the formulas. x_0 and x_t are left out of the sums over a row and put in by hand, in float64, for the
loss is a small difference of what belongs to them; the elements of the sums are float32 (float64 for float64 logits).
A token that has nothing to learn is not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.fusion_triton import FUSED
from vqfast.kernels.posterior.triton import log1p, noise_of, step_of

# Codes of one row that stay in registers between the passes (half as many in float64), 8 to a thread: more would spill.
# The blocks of a longer row are read again, from the cache.
_ONE_BLOCK = 4096
_BLOCK = 2048


@triton.jit
def _log1p_minus(r):
    """log(1 + r) - r for 0 <= r < 1e36, in float32 to a relative 2e-6: as csrc/cpu/simd_math.h has it."""
    if r.dtype == tl.float64:
        return tl.where(r < 1e-4, r * r * (r * (1 / 3 - r / 4) - 0.5), log1p(r) - r)
    else:
        # 1 + r = 2^e (1 + f), f in [-1/3, 1/3]. 2^-e and 2^-e - 1 are exact, so f has one rounding, none where e = 0.
        e = ((1 + r).to(tl.int32, bitcast=True) - 0x3F2AAAAB) >> 23
        scale = (0x3F800000 - (e << 23)).to(tl.float32, bitcast=True)
        f = r * scale + (scale - 1)
        p = f * -0.12577850 + 0.13746133
        p = f * p - 0.12255136
        p = f * p + 0.14056425
        p = f * p - 0.16675519
        p = f * p + 0.20007181
        p = f * p - 0.24999902
        p = f * p + 0.33333274
        square = f * f
        return (e.to(tl.float32) * 0.693147180559945 + (f - r)) + (square * f * p - 0.5 * square)


@triton.jit
def _odds(weights, k, K, ratio, noise_ptr):
    """r of each code, the noise of which it is a multiple (but for a factor of the row), and their product."""
    linear = weights * ratio.to(weights.dtype)
    if noise_ptr is None:
        return linear, 1.0, linear
    else:
        # A code that no noise gives has r = infinity; noise times r is what counts: with this it is right to 1e-18.
        m = tl.maximum(tl.load(noise_ptr + k, mask=k < K, other=1.0), 1e-18).to(weights.dtype)
        return linear / m, m, linear


@triton.jit
def _sums(weights, k, K, ratio, noise_ptr):
    """Of noise (log(1 + r) - r) and of noise (r - r / (1 + r))."""
    r, m, linear = _odds(weights, k, K, ratio, noise_ptr)
    return tl.sum((m * _log1p_minus(r)).to(tl.float64), 0), tl.sum((linear * (r / (1 + r))).to(tl.float64), 0)


@triton.jit
def _gradient(weights, k, K, ratio, noise_ptr, base, slope, x0, x_t, at_x0, at_x_t):
    r, _, _ = _odds(weights, k, K, ratio, noise_ptr)
    grad = weights * (base.to(weights.dtype) + slope.to(weights.dtype) * (r / (1 + r)))
    grad = tl.where(k == x_t, at_x_t.to(weights.dtype), grad)
    return tl.where(k == x0, at_x0.to(weights.dtype), grad)


@triton.jit
def _others(logits_ptr, k, K, peak, x0, x_t, dtype: tl.constexpr):
    """exp(logit - peak) of the codes k, 0 of x0, of x_t and beyond K."""
    logits = tl.load(logits_ptr + k, mask=k < K, other=float("-inf")).to(dtype)
    return tl.where((k == x0) | (k == x_t), 0.0, tl.exp(logits - peak))


# Scalars are worked out by every thread of a program: where only one of two values is needed, a branch saves the other.
@triton.jit
def _log_left(left, lost):
    """log(left), given lost = 1 - left as well: exact for both ends of 0..1."""
    if lost < 0.5:
        result = log1p(-lost)
    else:
        result = tl.log(left)
    return result


@triton.jit
def _negative_log(log_p, missed):
    result = -log_p
    if missed < 0.5:
        result = -log1p(-missed)
    return result


@triton.jit
def _share(signal, p, noise):
    """signal p / (signal p + noise); 1 where there is no noise, even if p has underflowed."""
    return tl.where(noise > 0, signal * p / tl.where(noise > 0, signal * p + noise, 1.0), 1.0)


@triton.jit
def _divergence(signal, spread, stay, move, masked, stayed, log_p, p_0, missed, p_t, noise_0, noise_t, logs):
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) over the codes, as terms of one sign."""
    if spread == 0:
        if stayed:
            odds = move * missed / (move + stay)
            kl = tl.where(odds > 0, tl.log(odds) - log_p, 0.0)
            if p_0 > 0:
                kl = log1p(odds / p_0)
        else:
            kl = _negative_log(log_p, missed) + log1p(stay * p_t / move)
    else:
        evidence = move + stay * tl.where(stayed, signal + noise_0, noise_t)
        most = signal + noise_0
        lost = signal * missed / most
        # Without noise at x_0 a p that has underflowed still has its logarithm.
        log_x0 = -_negative_log(log_p, missed)
        if noise_0 > 0:
            log_x0 = _log_left((signal * p_0 + noise_0) / most, lost)
        q_x0 = (move + tl.where(stayed, stay, 0.0)) * most / evidence
        kl = -q_x0 * (log_x0 + lost) - move / evidence * logs
        if stayed:
            lost = stay * signal * missed / evidence
            kl += _log_left((move + stay * (signal * p_0 + noise_0)) / evidence, lost) + lost
        elif noise_t > 0:
            kl += log1p(stay * signal * p_t / evidence) - stay * noise_t / evidence * log1p(signal * p_t / noise_t)
    return kl


@triton.jit
def _slopes(signal, spread, stay, move, masked, stayed, p_0, missed, p_t, noise_0, noise_t, curvature):
    """Of dKL/dlogit_k = p_k (base + slope r_k / (1 + r_k)): base and slope, and its values at x_0 and x_t."""
    p_i = tl.where(stayed, p_0, p_t)
    predicted = move + stay * (signal * p_i + tl.where(stayed, noise_0, noise_t))
    seen = tl.where(predicted > 0, stay * signal * p_i / tl.where(predicted > 0, predicted, 1.0), 1.0)
    evidence = move + stay * tl.where(stayed, signal + noise_0, noise_t)
    # Sum of q_k r_k / (1 + r_k), q the true posterior. Without noise it is 1, all of it at x_0.
    noisy = spread > 0
    of_x0 = (move + tl.where(stayed, stay, 0.0)) * (signal + noise_0) / evidence * _share(signal, p_0, noise_0)
    of_x0 = tl.where(noisy, of_x0, 1.0)
    share_t = tl.where(noisy & (stayed == 0) & (masked == 0), _share(signal, p_t, noise_t), 0.0)
    of_x_t = stay * noise_t / evidence * share_t
    slope = tl.where(noisy, move * signal / evidence, 0.0)
    total = of_x0 + of_x_t + tl.where(noisy, move / evidence * (signal * missed - curvature), 0.0)
    base = total - seen - slope
    at_x0 = p_0 * (total - seen) - of_x0 + tl.where(stayed, seen, 0.0)
    return base, slope, at_x0, p_t * (base + slope * share_t) - of_x_t + seen


@triton.jit(do_not_specialize=["L", "T", "K"])
def _diffusion_loss_kernel(
    logits_ptr,
    x0_ptr,
    x_t_ptr,
    t_ptr,
    s_ptr,
    levels_ptr,
    noise_ptr,
    scale_ptr,
    loss_ptr,
    grad_ptr,
    L,
    T,
    K,
    stride_b,
    stride_l,
    aux_weight: tl.float64,
    MASKED: tl.constexpr,
    MARGINAL: tl.constexpr,
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

    x0 = tl.minimum(tl.maximum(tl.load(x0_ptr + row), 0), K - 1)
    states = K + 1 if MASKED else K
    x_t = tl.minimum(tl.maximum(tl.load(x_t_ptr + row), 0), states - 1)
    signal, spread, stay, move, flip, shift, masked, certain = step_of(
        levels_ptr, noise_ptr, T, tl.load(t_ptr + sample), tl.load(s_ptr + sample), x_t, K, MASKED, MARGINAL
    )
    scale = tl.load(scale_ptr + row)
    if (scale == 0) | (certain & (aux_weight == 0)):
        tl.store(loss_ptr + row, 0.0)
        if WITH_GRAD:
            for start in range(0, K, BLOCK):
                k = start + block
                tl.store(grad_ptr + k, tl.zeros((BLOCK,), grad_ptr.dtype.element_ty), mask=k < K)
    else:
        stayed = x0 == x_t
        apart = (stayed == 0) & (masked == 0)
        left_out = tl.where(apart, x_t, -1)
        logits = tl.load(logits_ptr + block, mask=block < K, other=float("-inf")).to(dtype)
        peak = tl.max(logits, 0)
        if not ONE_BLOCK:
            for start in range(BLOCK, K, BLOCK):
                k = start + block
                logits = tl.load(logits_ptr + k, mask=k < K, other=float("-inf")).to(dtype)
                peak = tl.maximum(peak, tl.max(logits, 0))
        if ONE_BLOCK:
            weights = tl.where((block == x0) | (block == left_out), 0.0, tl.exp(logits - peak))
            others = tl.sum(weights.to(tl.float64), 0)
        else:
            others = tl.full((), 0.0, tl.float64)
            for start in range(0, K, BLOCK):
                others += tl.sum(_others(logits_ptr, start + block, K, peak, x0, left_out, dtype).to(tl.float64), 0)

        # What is predicted, after the marginal rule's shift.
        margin = tl.load(logits_ptr + x0).to(tl.float64) - peak.to(tl.float64)
        margin_t = tl.load(logits_ptr + tl.minimum(x_t, K - 1)).to(tl.float64) - peak.to(tl.float64)
        log_weight = margin - tl.where(stayed, shift, 0.0)
        weight = tl.exp(log_weight)
        weight_t = tl.where(apart, tl.exp(margin_t - shift), 0.0)
        total = others + weight + weight_t
        log_p, p_0, missed, p_t = (
            log_weight - tl.log(total),
            weight / total,
            (others + weight_t) / total,
            weight_t / total,
        )

        noise_0 = spread * noise_of(noise_ptr, x0, K)
        noise_t = tl.where(masked, 0.0, spread * noise_of(noise_ptr, tl.minimum(x_t, K - 1), K))
        # Of the row's noise, by which the passes' sums are multiplied; ratio 0 stands for no noise.
        unit = spread / K if noise_ptr is None else spread
        ratio = tl.where(unit > 0, signal / tl.where(unit > 0, unit, 1.0) / total, 0.0)
        if ONE_BLOCK:
            logs, curvature = _sums(weights, block, K, ratio, noise_ptr)
        else:
            logs = tl.full((), 0.0, tl.float64)
            curvature = tl.full((), 0.0, tl.float64)
            for start in range(0, K, BLOCK):
                weights = _others(logits_ptr, start + block, K, peak, x0, left_out, dtype)
                part_logs, part_curvature = _sums(weights, start + block, K, ratio, noise_ptr)
                logs += part_logs
                curvature += part_curvature
        r_t = tl.where(apart & (noise_t > 0), signal * p_t / tl.where(noise_t > 0, noise_t, 1.0), 0.0)
        logs = logs * unit + noise_t * _log1p_minus(r_t)
        curvature = curvature * unit + noise_t * r_t * (r_t / (1 + r_t))

        kl = flip * _divergence(
            signal, spread, stay, move, masked, stayed, log_p, p_0, missed, p_t, noise_0, noise_t, logs
        )
        # The auxiliary term is of the prediction itself, without the marginal rule's shift. At weight 0 it is left out:
        # 0 * inf where x_0 has probability 0.
        auxiliary, own_missed, own_p_t, own_total = missed * 0, missed, p_t, total
        if aux_weight != 0:
            own = tl.exp(margin)
            own_t = tl.where(apart, tl.exp(margin_t), 0.0)
            own_total = others + own + own_t
            own_missed, own_p_t = (others + own_t) / own_total, own_t / own_total
            auxiliary = aux_weight * _negative_log(margin - tl.log(own_total), own_missed)
        loss = tl.where(certain, 0.0, kl) + auxiliary
        is_number = total == total
        loss = tl.where(is_number, loss, total)
        tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty))

        if WITH_GRAD:
            base, slope, at_x0, at_x_t = _slopes(
                signal, spread, stay, move, masked, stayed, p_0, missed, p_t, noise_0, noise_t, curvature
            )
            by = scale * flip
            by_aux = scale * aux_weight
            base = tl.where(certain, 0.0, by * base / total) + by_aux / own_total
            slope = tl.where(certain, 0.0, by * slope / total)
            at_x0 = tl.where(certain, 0.0, by * at_x0) - by_aux * own_missed
            at_x_t = tl.where(certain, 0.0, by * at_x_t) + by_aux * own_p_t
            # A row that is no distribution has no gradient at any of its codes.
            base = tl.where(is_number, base, total)
            at_x0 = tl.where(is_number, at_x0, total)
            at_x_t = tl.where(is_number, at_x_t, total)
            if ONE_BLOCK:
                grad = _gradient(weights, block, K, ratio, noise_ptr, base, slope, x0, left_out, at_x0, at_x_t)
                tl.store(grad_ptr + block, grad.to(grad_ptr.dtype.element_ty), mask=block < K)
            else:
                for start in range(0, K, BLOCK):
                    k = start + block
                    weights = _others(logits_ptr, k, K, peak, x0, left_out, dtype)
                    grad = _gradient(weights, k, K, ratio, noise_ptr, base, slope, x0, left_out, at_x0, at_x_t)
                    tl.store(grad_ptr + k, grad.to(grad_ptr.dtype.element_ty), mask=k < K)


def diffusion_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    levels: Tensor,
    noise: Tensor | None,
    scale: Tensor,
    marginal: bool,
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
        levels.contiguous(),
        None if noise is None else noise.contiguous(),
        scale.contiguous(),
        loss,
        grad,
        L,
        levels.shape[0] - 1,
        K,
        logits.stride(0),
        logits.stride(1),
        aux_weight,
        MASKED=levels.shape[1] == 2,
        MARGINAL=marginal,
        WITH_GRAD=with_grad,
        WIDE=wide,
        ONE_BLOCK=one_block,
        BLOCK=block,
        num_warps=max(block // 256, 1),
        **FUSED,
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
        **FUSED,
    )
