"""Reverse step in Triton: one program a token, one streaming pass over its logits (three beyond _ONE_BLOCK).

Probabilities are float32 (float64 for float64 logits) relative to the row's peak; everything that is summed or
compared with a random number is float64. x_t is left out of the sums and put in by hand, for the marginal rule shifts
its logit. README.md has the mixture that is drawn and how scores are truncated.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.fusion_triton import FUSED
from vqfast.kernels.philox_triton import philox, uniform
from vqfast.kernels.posterior.triton import noise_code, noise_of, noised, shares, step_of

# Codes of one row that stay in registers between the passes, 8 to a thread.
_ONE_BLOCK = 4096
_BLOCK = 1024
_NONE = tl.constexpr(2147483647)


@triton.jit
def _scores(logits_ptr, other_ptr, k, K, guidance, dtype: tl.constexpr):
    """Scores of the codes k, -inf beyond K; other_ptr: unconditional logits, or None."""
    inside = k < K
    scores = tl.load(logits_ptr + k.to(tl.int64), mask=inside, other=float("-inf")).to(dtype)
    if other_ptr is None:
        return scores
    else:
        other = tl.load(other_ptr + k.to(tl.int64), mask=inside, other=float("-inf")).to(dtype)
        impossible = (scores == float("-inf")) | (other == float("-inf"))
        return tl.where(impossible, float("-inf"), other + guidance * (scores - other))


@triton.jit
def _in_order(bits):
    """An integer in the order of the floats whose bits it is; its own inverse."""
    width: tl.constexpr = bits.dtype.primitive_bitwidth
    least: tl.constexpr = 0x7FFFFFFF if width == 32 else 0x7FFFFFFFFFFFFFFF
    return bits ^ ((bits >> (width - 1)) & least)


@triton.jit
def _key_of(score):
    return _in_order(score.to(tl.int32 if score.dtype == tl.float32 else tl.int64, bitcast=True))


@triton.jit
def _score_of(key):
    return _in_order(key).to(tl.float32 if key.dtype == tl.int32 else tl.float64, bitcast=True)


@triton.jit
def _mean(low, high):
    """Rounded up, with no overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _kept(scores, k, least, last):
    """Whether a code is among the likely: of a larger score than `least`, or of that and no later than `last`. Not a
    number is kept, so that its row shows.
    """
    return ((scores < least) | ((scores == least) & (k > last))) == 0


@triton.jit
def _count(scores, logits_ptr, other_ptr, K, guidance, least, before, TIES: tl.constexpr, ONE_BLOCK: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """How many scores are at least `least`; with TIES how many of the codes below `before` equal it."""
    dtype: tl.constexpr = scores.dtype
    count = tl.full((), 0, tl.int32)
    for start in range(0, BLOCK if ONE_BLOCK else K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        part = scores if ONE_BLOCK else _scores(logits_ptr, other_ptr, k, K, guidance, dtype)
        counts = (part == least) & (k < before) if TIES else part >= least
        count += tl.sum((counts & (k < K)).to(tl.int32), 0)
    return count


@triton.jit
def _mass(scores, logits_ptr, other_ptr, K, guidance, peak, divisor, least, last, above, STRICT: tl.constexpr,
          ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Weight of the likely codes (of `least` and `last`) whose score is at least `above`; with STRICT, larger."""
    dtype: tl.constexpr = scores.dtype
    mass = tl.full((), 0.0, tl.float64)
    for start in range(0, BLOCK if ONE_BLOCK else K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        part = scores if ONE_BLOCK else _scores(logits_ptr, other_ptr, k, K, guidance, dtype)
        counts = part > above if STRICT else part >= above
        weights = tl.where(counts & _kept(part, k, least, last), tl.exp((part - peak) / divisor), 0.0)
        mass += tl.sum(weights.to(tl.float64), 0)
    return mass


@triton.jit
def _last_of(scores, logits_ptr, other_ptr, K, guidance, least, n, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """The code of the nth score that equals `least`; _NONE where there are no more."""
    last = tl.full((), _NONE, tl.int32)
    ties = _count(scores, logits_ptr, other_ptr, K, guidance, least, K, True, ONE_BLOCK, BLOCK)
    if (ties > n) & (least > float("-inf")):
        low = tl.full((), 0, tl.int32)
        high = tl.full((), 0, tl.int32) + K - 1
        while low < high:
            middle = _mean(low, high)
            fewer = _count(scores, logits_ptr, other_ptr, K, guidance, least, middle, True, ONE_BLOCK, BLOCK) < n
            low = tl.where(fewer, middle, low)
            high = tl.where(fewer, high, middle - 1)
        last = low
    return last


@triton.jit
def _likely(scores, logits_ptr, other_ptr, K, guidance, peak, divisor, top_k, top_p, TOP_K: tl.constexpr,
            TOP_P: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """`least` and `last` of the codes that a truncated draw may take, by bisection over the bits of a score."""
    never = tl.full((), float("-inf"), scores.dtype)
    least = never
    last = tl.full((), _NONE, tl.int32)
    if TOP_K:
        low, high = _key_of(never), _key_of(peak)
        while low < high:
            middle = _mean(low, high)
            enough = (
                _count(scores, logits_ptr, other_ptr, K, guidance, _score_of(middle), K, False, ONE_BLOCK, BLOCK)
                >= top_k
            )
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        least = _score_of(low)
        ties = _count(scores, logits_ptr, other_ptr, K, guidance, least, K, True, ONE_BLOCK, BLOCK)
        above = _count(scores, logits_ptr, other_ptr, K, guidance, least, K, False, ONE_BLOCK, BLOCK) - ties
        last = _last_of(scores, logits_ptr, other_ptr, K, guidance, least, top_k - above, ONE_BLOCK, BLOCK)
    if TOP_P:
        share = top_p * _mass(
            scores, logits_ptr, other_ptr, K, guidance, peak, divisor, least, last, never, False, ONE_BLOCK, BLOCK
        )
        low, high = _key_of(never), _key_of(peak)
        while low < high:
            middle = _mean(low, high)
            mass = _mass(
                scores, logits_ptr, other_ptr, K, guidance, peak, divisor, least, last, _score_of(middle), False,
                ONE_BLOCK, BLOCK,
            )  # fmt: skip
            low = tl.where(mass >= share, middle, low)
            high = tl.where(mass >= share, high, middle - 1)
        found = _score_of(low)
        above = _mass(
            scores, logits_ptr, other_ptr, K, guidance, peak, divisor, least, last, found, True, ONE_BLOCK, BLOCK
        )
        n = tl.ceil((share - above) / tl.exp((found - peak) / divisor).to(tl.float64))
        earlier = tl.where(least == found, last, _NONE)
        last = tl.minimum(earlier, _last_of(scores, logits_ptr, other_ptr, K, guidance, found, n, ONE_BLOCK, BLOCK))
        least = found
    return least, last


@triton.jit
def _weights(scores, k, peak, divisor, least, last, x_t, at_x_t):
    """exp((score - peak) / divisor) of the likely codes, 0 of others, `at_x_t` of x_t; NaN where the peak is not
    finite.
    """
    weights = tl.where(_kept(scores, k, least, last), tl.exp((scores - peak) / divisor), 0.0)
    return tl.where(k == x_t, at_x_t, weights)


@triton.jit
def _first_above(weights, k, before, mark):
    """The first code of positive weight whose cumulative weight, from `before` on, exceeds `mark`; else _NONE."""
    cumulative = before + tl.cumsum(weights.to(tl.float64), 0)
    return tl.min(tl.where((cumulative > mark) & (weights > 0), k, _NONE), 0)


@triton.jit
def _last_positive(weights, k):
    return tl.max(tl.where(weights > 0, k, 0), 0)


@triton.jit(do_not_specialize=["L", "T", "K", "top_k"])
def _p_sample_kernel(
    logits_ptr,
    other_ptr,
    x_t_ptr,
    t_ptr,
    s_ptr,
    levels_ptr,
    noise_ptr,
    cumulative_ptr,
    known_ptr,
    key_ptr,
    out_ptr,
    L,
    T,
    K,
    stride_b,
    stride_l,
    other_stride_b,
    other_stride_l,
    temperature: tl.float64,
    guidance: tl.float64,
    top_k,
    top_p: tl.float64,
    MASKED: tl.constexpr,
    MARGINAL: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample = row // L
    t, s = tl.load(t_ptr + sample), tl.load(s_ptr + sample)
    states = K + 1 if MASKED else K
    x_t = tl.minimum(tl.maximum(tl.load(x_t_ptr + row), 0), states - 1)
    signal, spread, stay_share, move, flip, shift, masked, certain = step_of(
        levels_ptr, noise_ptr, T, t, s, x_t, K, MASKED, MARGINAL
    )
    part, code_bits = philox(key_ptr, row, 0)
    part = uniform(part)

    # What staying, a code of the noise and a code of the prediction weigh; staying at the least, for p(x_t) = 0.
    moving = tl.where(masked, flip, move)
    replace, predict = moving * (1 - signal), moving * signal
    of_noise = tl.where(masked, 0.0, spread * noise_of(noise_ptr, tl.minimum(x_t, K - 1), K))
    least_stay = tl.where(masked, 1 - flip, stay_share * of_noise)
    mark = part * (least_stay + replace + predict)
    stays = certain | (mark < least_stay)
    # A masked token's weights do not depend on the logits: only if it takes a code of the prediction are they read.
    replaced = (stays == 0) & masked & (mark < least_stay + replace)
    predicted = (stays | replaced) == 0

    x_s = x_t
    known = tl.full((), -1, tl.int64)
    if known_ptr is not None:
        known = tl.load(known_ptr + row)
        kept, others, gone = shares(levels_ptr, s, T, True, MASKED)
        if known >= 0:
            known = tl.minimum(known, K - 1)
            x_s = noised(part, noise_code(cumulative_ptr, code_bits, K), known, kept, others, gone, K)
            replaced = known < 0
            predicted = known < 0

    if predicted:
        dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
        logits_ptr += sample * stride_b + (row % L) * stride_l
        if other_ptr is not None:
            other_ptr += sample * other_stride_b + (row % L) * other_stride_l
        divisor = tl.full((), temperature, tl.float64).to(dtype)
        guide = tl.full((), guidance, tl.float64).to(dtype)
        block = tl.arange(0, BLOCK)
        scores = _scores(logits_ptr, other_ptr, block, K, guide, dtype)
        peak = tl.max(scores, 0)
        if not ONE_BLOCK:
            for start in range(BLOCK, K, BLOCK):
                peak = tl.maximum(peak, tl.max(_scores(logits_ptr, other_ptr, start + block, K, guide, dtype), 0))
        least, last = _likely(
            scores, logits_ptr, other_ptr, K, guide, peak, divisor, top_k, top_p, TOP_K, TOP_P, ONE_BLOCK, BLOCK
        )

        code = tl.minimum(x_t, K - 1)
        score = _scores(logits_ptr, other_ptr, code, K, guide, dtype)
        left_out = tl.where(masked, -1, code)
        weight = tl.where(_kept(score, code, least, last), tl.exp((score - peak) / divisor), 0.0)
        weight = tl.where(masked, 0.0, weight * tl.exp(-shift).to(dtype))
        total = weight.to(tl.float64)
        if ONE_BLOCK:
            weights = _weights(scores, block, peak, divisor, least, last, left_out, weight)
            total = tl.sum(weights.to(tl.float64), 0)
        else:
            for start in range(0, K, BLOCK):
                k = start + block
                scores = _scores(logits_ptr, other_ptr, k, K, guide, dtype)
                weights = _weights(scores, k, peak, divisor, least, last, left_out, 0.0)
                total += tl.sum(weights.to(tl.float64), 0)

        # A row whose total is not a positive number keeps a code; a token that leaves the mask takes one of the noise.
        valid = (total > 0) & (total < float("inf"))
        p_t = weight.to(tl.float64) / tl.where(valid, total, 1.0)
        stay = stay_share * (signal * p_t + of_noise)
        target = part * (stay + replace + predict)
        stays = (masked == 0) & ((valid == 0) | (target < stay))
        replaced = (stays == 0) & tl.where(masked, valid == 0, target < stay + replace)
        if (stays | replaced) == 0:
            within, _ = philox(key_ptr, row, 1)
            mark = uniform(within) * total
            if ONE_BLOCK:
                drawn = _first_above(weights, block, 0.0, mark)
                final = _last_positive(weights, block)
            else:
                drawn = tl.full((), _NONE, tl.int32)
                final = tl.full((), 0, tl.int32)
                before = tl.full((), 0.0, tl.float64)
                start = tl.full((), 0, tl.int32)
                while (start < K) & (drawn == _NONE):
                    k = start + block
                    scores = _scores(logits_ptr, other_ptr, k, K, guide, dtype)
                    weights = _weights(scores, k, peak, divisor, least, last, left_out, weight)
                    after = before + tl.sum(weights.to(tl.float64), 0)
                    if after > mark:
                        drawn = _first_above(weights, k, before, mark)
                    final = tl.maximum(final, _last_positive(weights, k))
                    before = after
                    start += BLOCK
            x_s = tl.minimum(drawn, final).to(tl.int64)

    if replaced:
        x_s = noise_code(cumulative_ptr, code_bits, K)
    tl.store(out_ptr + row, x_s)


def p_sample(
    logits: Tensor,
    unconditional: Tensor | None,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    levels: Tensor,
    noise: Tensor | None,
    known: Tensor | None,
    marginal: bool,
    temperature: float,
    guidance: float,
    top_k: int,
    top_p: float,
    key: Tensor,
) -> Tensor:
    x_t = x_t.contiguous()
    out = torch.empty_like(x_t)
    if out.numel() == 0:
        return out
    L, K = logits.shape[1:]
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    if unconditional is not None and unconditional.stride(2) != 1:
        unconditional = unconditional.contiguous()
    wide = logits.dtype == torch.float64
    if not wide:
        # Beyond these the float32 quotient under- or overflows; the distribution is a peak or flat long before.
        temperature = min(max(temperature, 1e-30), 1e30)
    one_block = K <= _ONE_BLOCK
    block = max(32, triton.next_power_of_2(K)) if one_block else _BLOCK
    _p_sample_kernel[(out.numel(),)](
        logits,
        unconditional,
        x_t,
        t.contiguous(),
        s.contiguous(),
        levels.contiguous(),
        None if noise is None else noise.contiguous(),
        None if noise is None else noise.cumsum(0),
        None if known is None else known.contiguous(),
        key.contiguous(),
        out,
        L,
        levels.shape[0] - 1,
        K,
        *logits.stride()[:2],
        *((0, 0) if unconditional is None else unconditional.stride()[:2]),
        temperature,
        guidance,
        top_k,
        top_p,
        MASKED=levels.shape[1] == 2,
        MARGINAL=marginal,
        TOP_K=0 < top_k < K,
        TOP_P=top_p < 1,
        WIDE=wide,
        ONE_BLOCK=one_block,
        BLOCK=block,
        num_warps=max(block // 256, 1),
        **FUSED,
    )
    return out
