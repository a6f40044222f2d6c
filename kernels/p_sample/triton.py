"""Uniform reverse step in Triton: one program a token, one streaming pass over its logits (three beyond _ONE_BLOCK).

Probabilities are float32 (float64 for float64 logits) relative to the row's peak; everything that is summed or
compared with a random number is float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.philox_triton import below, philox, uniform

# Codes of one row that stay in registers between the passes, 8 to a thread.
_ONE_BLOCK = 4096
_BLOCK = 1024
_NONE = tl.constexpr(2147483647)


@triton.jit
def _weights(logits_ptr, k, K, peak, temperature):
    """exp((logit - peak) / temperature) of the codes k, 0 beyond K; NaN where the peak is not finite."""
    logits = tl.load(logits_ptr + k.to(tl.int64), mask=k < K, other=float("-inf")).to(peak.dtype)
    return tl.exp((logits - peak) / temperature)


@triton.jit
def _first_above(weights, k, before, mark):
    """The first code of positive weight whose cumulative weight, from `before` on, exceeds `mark`; else _NONE."""
    cumulative = before + tl.cumsum(weights.to(tl.float64), 0)
    return tl.min(tl.where((cumulative > mark) & (weights > 0), k, _NONE), 0)


@triton.jit
def _last_positive(weights, k):
    return tl.max(tl.where(weights > 0, k, 0), 0)


@triton.jit(do_not_specialize=["L", "T", "K"])
def _p_sample_kernel(
    logits_ptr,
    x_t_ptr,
    t_ptr,
    s_ptr,
    alpha_bar_ptr,
    known_ptr,
    key_ptr,
    out_ptr,
    L,
    T,
    K,
    stride_b,
    stride_l,
    temperature: tl.float64,
    HAS_KNOWN: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample = row // L
    t = tl.minimum(tl.maximum(tl.load(t_ptr + sample), 0), T)
    s = tl.minimum(tl.maximum(tl.load(s_ptr + sample), 0), T)
    alpha_s = tl.load(alpha_bar_ptr + s)
    part, any_code = philox(key_ptr, row, 0)
    part, any_code = uniform(part), below(any_code, K)

    known = tl.full((), -1, tl.int64)
    if HAS_KNOWN:
        known = tl.load(known_ptr + row)
    if known >= 0:
        tl.store(out_ptr + row, tl.where(part < alpha_s, known, any_code))
    else:
        dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
        logits_ptr += sample * stride_b + (row % L) * stride_l
        divisor = tl.full((), temperature, tl.float64).to(dtype)
        k = tl.arange(0, BLOCK)
        if ONE_BLOCK:
            logits = tl.load(logits_ptr + k, mask=k < K, other=float("-inf")).to(dtype)
            peak = tl.max(logits, 0)
            weights = tl.exp((logits - peak) / divisor)
            total = tl.sum(weights.to(tl.float64), 0)
        else:
            peak = tl.full((), float("-inf"), dtype)
            for start in range(0, K, BLOCK):
                logits = tl.load(logits_ptr + start + k, mask=start + k < K, other=float("-inf"))
                peak = tl.maximum(peak, tl.max(logits.to(dtype), 0))
            total = tl.full((), 0.0, tl.float64)
            for start in range(0, K, BLOCK):
                weights = _weights(logits_ptr, start + k, K, peak, divisor)
                total += tl.sum(weights.to(tl.float64), 0)

        x_t = tl.load(x_t_ptr + row)
        stay_logit = tl.load(logits_ptr + tl.minimum(tl.maximum(x_t, 0), K - 1)).to(dtype)
        p_stay = tl.exp((stay_logit - peak) / divisor).to(tl.float64) / total
        a = tl.load(alpha_bar_ptr + t) / alpha_s
        stay = a * (alpha_s * p_stay + (1 - alpha_s) / K)
        replace = (1 - a) * (1 - alpha_s) / K
        predict = (1 - a) * alpha_s / K
        target = part * (stay + replace + predict)

        # Rows whose total is not a positive number keep x_t, as do those whose draw says so.
        x_s = x_t
        if (total > 0) & (total < float("inf")) & (target >= stay):
            x_s = any_code
            if target >= stay + replace:
                within, _ = philox(key_ptr, row, 1)
                mark = uniform(within) * total
                if ONE_BLOCK:
                    drawn = _first_above(weights, k, 0.0, mark)
                    last = _last_positive(weights, k)
                else:
                    drawn = tl.full((), _NONE, tl.int32)
                    last = tl.full((), 0, tl.int32)
                    before = tl.full((), 0.0, tl.float64)
                    start = tl.full((), 0, tl.int32)
                    while (start < K) & (drawn == _NONE):
                        weights = _weights(logits_ptr, start + k, K, peak, divisor)
                        after = before + tl.sum(weights.to(tl.float64), 0)
                        if after > mark:
                            drawn = _first_above(weights, start + k, before, mark)
                        last = tl.maximum(last, _last_positive(weights, start + k))
                        before = after
                        start += BLOCK
                x_s = tl.minimum(drawn, last).to(tl.int64)
        tl.store(out_ptr + row, x_s)


def uniform_p_sample(
    logits: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    alpha_bar: Tensor,
    known: Tensor | None,
    temperature: float,
    key: Tensor,
) -> Tensor:
    x_t = x_t.contiguous()
    out = torch.empty_like(x_t)
    if out.numel() == 0:
        return out
    L, K = logits.shape[1:]
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    wide = logits.dtype == torch.float64
    if not wide:
        # Beyond these the float32 quotient under- or overflows; the distribution is a peak or flat long before.
        temperature = min(max(temperature, 1e-30), 1e30)
    one_block = K <= _ONE_BLOCK
    block = max(32, triton.next_power_of_2(K)) if one_block else _BLOCK
    _p_sample_kernel[(out.numel(),)](
        logits,
        x_t,
        t.contiguous(),
        s.contiguous(),
        alpha_bar.contiguous(),
        None if known is None else known.contiguous(),
        key.contiguous(),
        out,
        L,
        alpha_bar.shape[0] - 1,
        K,
        logits.stride(0),
        logits.stride(1),
        temperature,
        HAS_KNOWN=known is not None,
        WIDE=wide,
        ONE_BLOCK=one_block,
        BLOCK=block,
        num_warps=max(block // 256, 1),
    )
    return out
