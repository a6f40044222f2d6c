"""Log-probabilities of the predicted x_s and their gradient in Triton: a token in one program, one read of its logits.

README.md derives the formulas. x_t is left out of the passes over a row and put in by hand, in float64, which makes the
marginal rule's shift exact; the elements are float32 (float64 for float64 logits). A certain token is not read.
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
def _log_add(a, b):
    """log(exp(a) + exp(b)), of which either or both may be -infinity."""
    high = tl.maximum(a, b)
    return tl.where(high == float("-inf"), high, high + log1p(tl.exp(tl.minimum(a, b) - high)))


@triton.jit
def _others(logits_ptr, k, K, left_out, dtype: tl.constexpr):
    """The logits of the codes k; -infinity of x_t and beyond K."""
    logits = tl.load(logits_ptr + k, mask=k < K, other=float("-inf")).to(dtype)
    return tl.where(k == left_out, float("-inf"), logits)


@triton.jit
def _predicted(logits, first, logits_ptr, K, left_out, logit_t, ONE_BLOCK: tl.constexpr):
    """The largest logit, the sum of all weights exp(logit - largest) and the logarithm of x_t's.

    logits: the codes `first`, without x_t, of which logit_t is the logit, shifted.
    """
    peak = tl.max(logits, 0)
    if not ONE_BLOCK:
        for start in range(first.shape[0], K, first.shape[0]):
            peak = tl.maximum(peak, tl.max(_others(logits_ptr, start + first, K, left_out, logits.dtype), 0))
    # The shift may take x_t far below all others: it has no part in the largest as it was.
    peak = tl.maximum(peak, logit_t.to(logits.dtype))
    total = tl.sum(tl.exp(logits - peak).to(tl.float64), 0)
    if not ONE_BLOCK:
        for start in range(first.shape[0], K, first.shape[0]):
            weights = tl.exp(_others(logits_ptr, start + first, K, left_out, logits.dtype) - peak)
            total += tl.sum(weights.to(tl.float64), 0)
    margin = logit_t - peak.to(tl.float64)
    return peak, total + tl.exp(margin), margin


@triton.jit
def _log_posterior(logits, k, K, peak, level, noise_ptr, spread, factor, left_out, at_x_t):
    """level: what makes a logit less the peak the logarithm of what is predicted; factor: what multiplies the sum."""
    log_p = logits - peak + level.to(logits.dtype)
    if spread > 0:
        if noise_ptr is None:
            drawn = tl.log(spread / K).to(logits.dtype)
        else:
            noise = tl.load(noise_ptr + k, mask=k < K, other=1.0).to(logits.dtype)
            drawn = tl.log(noise) + tl.log(spread).to(logits.dtype)
        log_p = _log_add(log_p, drawn + tl.zeros_like(log_p))
    return tl.where(k == left_out, at_x_t.to(logits.dtype), log_p + factor.to(logits.dtype))


@triton.jit(do_not_specialize=["L", "T", "K"])
def _posterior_kernel(
    logits_ptr,
    x_t_ptr,
    t_ptr,
    s_ptr,
    levels_ptr,
    noise_ptr,
    out_ptr,
    L,
    T,
    K,
    stride_b,
    stride_l,
    MASKED: tl.constexpr,
    MARGINAL: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    sample = row // L
    states = K + 1 if MASKED else K
    logits_ptr += sample * stride_b + (row % L) * stride_l
    out_ptr += row * states
    block = tl.arange(0, BLOCK)

    x_t = tl.minimum(tl.maximum(tl.load(x_t_ptr + row), 0), states - 1)
    signal, spread, stay, move, flip, shift, masked, certain = step_of(
        levels_ptr, noise_ptr, T, tl.load(t_ptr + sample), tl.load(s_ptr + sample), x_t, K, MASKED, MARGINAL
    )
    if MASKED:
        stays_masked = tl.log(tl.where(masked, 1 - flip, 0.0)).to(dtype)
        tl.store(out_ptr + K, stays_masked.to(out_ptr.dtype.element_ty))
    if certain:
        for start in range(0, K, BLOCK):
            k = start + block
            log_p = tl.where(k == x_t, 0.0, float("-inf"))
            tl.store(out_ptr + k, log_p.to(out_ptr.dtype.element_ty), mask=k < K)
    else:
        code = tl.minimum(x_t, K - 1)
        left_out = tl.where(masked, -1, x_t)
        logit_t = tl.where(masked, float("-inf"), tl.load(logits_ptr + code).to(tl.float64) - shift)
        logits = _others(logits_ptr, block, K, left_out, dtype)
        peak, total, margin = _predicted(logits, block, logits_ptr, K, left_out, logit_t, ONE_BLOCK)

        log_signal, log_total = tl.log(signal), tl.log(total)
        noise_t = tl.where(masked, 0.0, spread * noise_of(noise_ptr, code, K))
        predicted_t = signal * tl.exp(margin) / total + noise_t
        evidence = move + stay * predicted_t
        factor = tl.log(move * flip / evidence)
        # Without noise at x_t a probability that has underflowed still has its logarithm.
        log_t = log_signal + margin - log_total
        if noise_t > 0:
            log_t = tl.log(predicted_t)
        at_x_t = tl.log((stay + move) * flip / evidence) + log_t
        # A row that is no distribution has no posterior of any of its codes.
        factor = tl.where(total == total, factor, total)
        level = log_signal - log_total
        # One turn where the row is one block.
        for start in range(0, K, BLOCK):
            k = start + block
            if not ONE_BLOCK:
                logits = _others(logits_ptr, k, K, left_out, dtype)
            log_p = _log_posterior(logits, k, K, peak, level, noise_ptr, spread, factor, left_out, at_x_t)
            tl.store(out_ptr + k, log_p.to(out_ptr.dtype.element_ty), mask=k < K)


@triton.jit
def _moved(weights, grad, k, K, noise_ptr, signal, spread):
    """A code's gradient by the share of its probability in x_s that is predicted; signal: of a weight."""
    predicted = weights * signal.to(weights.dtype)
    if noise_ptr is None:
        drawn = tl.zeros_like(predicted) + (spread / K).to(weights.dtype)
    else:
        noise = tl.load(noise_ptr + k, mask=k < K, other=1.0).to(weights.dtype)
        drawn = noise * spread.to(weights.dtype)
    noisy = drawn > 0
    return tl.where(noisy, grad * (predicted / tl.where(noisy, predicted + drawn, 1.0)), grad)


@triton.jit(do_not_specialize=["L", "T", "K"])
def _posterior_backward_kernel(
    grad_ptr,
    logits_ptr,
    x_t_ptr,
    t_ptr,
    s_ptr,
    levels_ptr,
    noise_ptr,
    out_ptr,
    L,
    T,
    K,
    grad_stride_b,
    grad_stride_l,
    stride_b,
    stride_l,
    MASKED: tl.constexpr,
    MARGINAL: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    sample = row // L
    states = K + 1 if MASKED else K
    grad_ptr += sample * grad_stride_b + (row % L) * grad_stride_l
    logits_ptr += sample * stride_b + (row % L) * stride_l
    out_ptr += row * K
    block = tl.arange(0, BLOCK)

    x_t = tl.minimum(tl.maximum(tl.load(x_t_ptr + row), 0), states - 1)
    signal, spread, stay, move, flip, shift, masked, certain = step_of(
        levels_ptr, noise_ptr, T, tl.load(t_ptr + sample), tl.load(s_ptr + sample), x_t, K, MASKED, MARGINAL
    )
    if certain:
        for start in range(0, K, BLOCK):
            k = start + block
            tl.store(out_ptr + k, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=k < K)
    else:
        code = tl.minimum(x_t, K - 1)
        left_out = tl.where(masked, -1, x_t)
        logit_t = tl.where(masked, float("-inf"), tl.load(logits_ptr + code).to(tl.float64) - shift)
        logits = _others(logits_ptr, block, K, left_out, dtype)
        peak, total, margin = _predicted(logits, block, logits_ptr, K, left_out, logit_t, ONE_BLOCK)

        of_weight = signal / total
        # In float64: x_t's gradient is a small difference of what all codes' add up to.
        given = tl.full((), 0.0, tl.float64)
        moved = tl.full((), 0.0, tl.float64)
        weights = tl.exp(logits - peak)
        grad = tl.load(grad_ptr + block, mask=block < K, other=0.0).to(dtype)
        # One turn where the row is one block.
        for start in range(0, K, BLOCK):
            k = start + block
            if not ONE_BLOCK:
                weights = tl.exp(_others(logits_ptr, k, K, left_out, dtype) - peak)
                grad = tl.load(grad_ptr + k, mask=k < K, other=0.0).to(dtype)
            given += tl.sum(grad.to(tl.float64), 0)
            by_code = tl.where(k == left_out, 0.0, _moved(weights, grad, k, K, noise_ptr, of_weight, spread))
            moved += tl.sum(by_code.to(tl.float64), 0)

        p_t = tl.exp(margin) / total
        noise_t = tl.where(masked, 0.0, spread * noise_of(noise_ptr, code, K))
        predicted_t = signal * p_t + noise_t
        share_t = tl.where(noise_t > 0, signal * p_t / tl.where(noise_t > 0, predicted_t, 1.0), 1.0)
        seen = given * (stay * signal * p_t / (move + stay * predicted_t))
        moved_t = tl.where(masked, 0.0, tl.load(grad_ptr + code).to(tl.float64) * share_t)
        pull = moved + moved_t - seen
        at_x_t = moved_t - p_t * pull - seen
        # A row that is no distribution has no gradient at any of its codes.
        pull = tl.where(total == total, pull, total)
        by_weight = pull / total
        for start in range(0, K, BLOCK):
            k = start + block
            if not ONE_BLOCK:
                weights = tl.exp(_others(logits_ptr, k, K, left_out, dtype) - peak)
                grad = tl.load(grad_ptr + k, mask=k < K, other=0.0).to(dtype)
            out = _moved(weights, grad, k, K, noise_ptr, of_weight, spread) - weights * by_weight.to(dtype)
            out = tl.where(k == left_out, at_x_t.to(dtype), out)
            tl.store(out_ptr + k, out.to(out_ptr.dtype.element_ty), mask=k < K)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _options(logits: Tensor, levels: Tensor, marginal: bool) -> dict:
    wide, K = logits.dtype == torch.float64, logits.shape[2]
    width = 2 if wide else 1
    one_block = K <= _ONE_BLOCK // width
    block = max(32, triton.next_power_of_2(K)) if one_block else _BLOCK // width
    return dict(
        MASKED=levels.shape[1] == 2,
        MARGINAL=marginal,
        WIDE=wide,
        ONE_BLOCK=one_block,
        BLOCK=block,
        num_warps=max(block // 256, 1),
        **FUSED,
    )


def posterior(
    logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor, levels: Tensor, noise: Tensor | None, marginal: bool
) -> Tensor:
    B, L, K = logits.shape
    log_p = logits.new_empty(B, L, K + levels.shape[1] - 1)
    if x_t.numel() == 0:
        return log_p
    logits = _rows(logits)
    _posterior_kernel[(B * L,)](
        logits,
        x_t.contiguous(),
        t.contiguous(),
        s.contiguous(),
        levels.contiguous(),
        None if noise is None else noise.contiguous(),
        log_p,
        L,
        levels.shape[0] - 1,
        K,
        logits.stride(0),
        logits.stride(1),
        **_options(logits, levels, marginal),
    )
    return log_p


def posterior_backward(
    grad: Tensor,
    logits: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    levels: Tensor,
    noise: Tensor | None,
    marginal: bool,
) -> Tensor:
    B, L, K = logits.shape
    grad_logits = logits.new_empty(B, L, K)
    if x_t.numel() == 0:
        return grad_logits
    grad, logits = _rows(grad), _rows(logits)
    _posterior_backward_kernel[(B * L,)](
        grad,
        logits,
        x_t.contiguous(),
        t.contiguous(),
        s.contiguous(),
        levels.contiguous(),
        None if noise is None else noise.contiguous(),
        grad_logits,
        L,
        levels.shape[0] - 1,
        K,
        grad.stride(0),
        grad.stride(1),
        logits.stride(0),
        logits.stride(1),
        **_options(logits, levels, marginal),
    )
    return grad_logits
