"""Exact nearest-code search in Triton: a float32 pass that proves its own answers, twice float64 for the rest.

The score of a code is s = X.C - |C|^2 / 2 for distances, with X = r (x - mu) and C = r (c - mu); mu is one float32
vector near the middle of the codebook, so that a common offset costs no precision, and r a power of two that brings the
deviations near 1. For products it is X.C with X = r_x x, each row with a power of two of its own, and C = r c; for
cosines C = c / |c|. The search kernel computes s in float32, keeps the best and the second best, and bounds its own
error by B (see `_bound`). A best that leads by more than 2 B is the nearest code of the real numbers; where it does
not, the kernel writes -1 and the decide kernel compares all codes in twice float64
(csrc/include/exact_distance.h).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.fusion_triton import FUSED, SEPARATE

_BLOCK_N, _BLOCK_K, _BLOCK_D, _WARPS = 64, 64, 16, 4
# How many codes, evenly spaced, mu is the mean of. Any mu is right; a better centre would certify few rows more.
_SAMPLES = 32
_UNIT_ROUNDOFF = 2.0**-24
_METRICS = {"l2": 0, "dot": 1, "cosine": 2}
_L2, _COSINE = tl.constexpr(0), tl.constexpr(2)
# Squares of cosines closer than this, relative to themselves, tie.
_EQUAL_COSINES = tl.constexpr(2.0**-96)

# Below the square root of _TINY norms are rounded up to it, so that B also covers the products that underflow.
_TINY = tl.constexpr(1e-28)
# |x - mu| C + C^2 beyond _HUGE could overflow a score; half norms are stored up to _HUGE_HALF_NORM, which is beyond.
_HUGE = tl.constexpr(1e37)
_HUGE_HALF_NORM = tl.constexpr(1e38)


def _bound(D: int) -> tuple[float, float]:
    """(p, q) of the bound B = p |x - mu| C + q C^2 on the error of a float32 score, C = max |c - mu|.

    With u the unit roundoff and g_m = m u / (1 - m u), the bound of m roundings in any order:
        x - mu and c - mu rounded to float32           2 u |x - mu| C
        D products and their sum, fused or not         g_D |x - mu| C
        the half norm rounded from float64             u C^2 / 2
        the subtraction of the half norm               u (|x - mu| C + C^2 / 2)
        cosines: the factor 1 / |c|, and c times it    u |x| C more than above
    g_(D+8) holds the D + 4 of them and the rounding of B itself; |x - mu| comes from a float32 sum of squares, hence
    the factor 1 + g. A hundredth more covers products of the above and underflow (_TINY).
    """
    m = (D + 8) * _UNIT_ROUNDOFF
    if m >= 0.5:
        return float("inf"), float("inf")
    g = m / (1 - m)
    return 1.01 * g * (1 + g), 1.01 * _UNIT_ROUNDOFF


@triton.jit
def _power_of_two(largest, MOST: tl.constexpr):
    """The power of two that brings a float64 to [1, 2), its exponent at most MOST; 1 where it is 0, infinite or NaN."""
    exponent = (largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    exponent = tl.minimum(tl.maximum(2046 - exponent, 1023 - MOST), 1023 + MOST)
    power = (exponent << 52).to(tl.float64, bitcast=True)
    return tl.where((largest > 0) & (largest < float("inf")), power, 1.0)


@triton.jit
def _centre(values, mean, scale):
    """scale (values - mean) as float32: one rounding of the difference, whatever the dtype of the values."""
    if values.dtype == tl.float64:
        return ((values - mean.to(tl.float64)) * scale.to(tl.float64)).to(tl.float32)
    else:
        return (values.to(tl.float32) - mean) * scale.to(tl.float32)


@triton.jit(do_not_specialize=["K", "samples", "sample_step"])
def _prepare_kernel(
    codebook_ptr,
    mean_ptr,
    scale_ptr,
    factor_ptr,
    half_norm_ptr,
    K,
    D,
    samples,
    sample_step,
    METRIC: tl.constexpr,
    MOST: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """mu, r, and for each code what its values are multiplied by and |C|^2 / 2: +inf for one that holds a NaN or an
    infinity, which no search can choose."""
    code = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    sample = tl.arange(0, SAMPLES)
    widest = tl.full((), 0.0, tl.float64)
    # Every program takes the same mean and the same scale, to the bit; the first one stores them for the search.
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (sample < samples)[:, None] & (d < D)[None, :]
        sampled = tl.load(
            codebook_ptr + (sample.to(tl.int64) * sample_step)[:, None] * D + d[None, :], mask=inside, other=0.0
        ).to(tl.float64)
        finite = tl.abs(sampled) < float("inf")
        sampled = tl.where(finite, sampled, 0.0)
        mean = (tl.sum(sampled, 0) / samples).to(tl.float32)
        mean = tl.where((tl.abs(mean) < float("inf")) & (METRIC == _L2), mean, 0.0)
        deviation = tl.where(finite & inside, tl.abs(sampled - mean.to(tl.float64)[None, :]), 0.0)
        widest = tl.maximum(widest, tl.max(tl.max(deviation, 1), 0))
        if tl.program_id(0) == 0:
            tl.store(mean_ptr + d, mean, mask=d < D)
    scale = _power_of_two(widest, MOST)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)

    broken = tl.zeros((BLOCK_K,), tl.int32)
    own = tl.zeros((BLOCK_K,), tl.float64)
    if METRIC == _COSINE:
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            values = tl.load(
                codebook_ptr + code[:, None] * D + d[None, :], mask=(code < K)[:, None] & (d < D)[None, :], other=0.0
            ).to(tl.float64)
            own = tl.maximum(own, tl.max(tl.abs(values), 1))
        own = _power_of_two(own, 1000)
    else:
        own += scale
    square = tl.zeros((BLOCK_K,), tl.float64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        sampled = tl.load(
            codebook_ptr + (sample.to(tl.int64) * sample_step)[:, None] * D + d[None, :],
            mask=(sample < samples)[:, None] & (d < D)[None, :],
            other=0.0,
        ).to(tl.float64)
        sampled = tl.where(tl.abs(sampled) < float("inf"), sampled, 0.0)
        mean = (tl.sum(sampled, 0) / samples).to(tl.float32)
        mean = tl.where((tl.abs(mean) < float("inf")) & (METRIC == _L2), mean, 0.0)
        values = tl.load(
            codebook_ptr + code[:, None] * D + d[None, :],
            mask=(code < K)[:, None] & (d < D)[None, :],
            other=0.0,
        ).to(tl.float64)
        broken = tl.maximum(broken, tl.max(tl.where(tl.abs(values) < float("inf"), 0, 1), 1))
        difference = (values - mean.to(tl.float64)[None, :]) * own[:, None]
        difference = tl.where((code < K)[:, None] & (d < D)[None, :], difference, 0.0)
        square += tl.sum(difference * difference, 1)
    half_norm = tl.where(square < 2 * _HUGE_HALF_NORM, 0.5 * square, _HUGE_HALF_NORM)
    factor = own
    if METRIC == _COSINE:
        factor = tl.where(square > 0, own / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
        # A factor beyond float32 would leave its code out: with such a norm nothing is certain.
        usable = (factor < 1e37) & ((factor > 1e-37) | (square == 0))
        half_norm = tl.where(usable, 0.50001, _HUGE_HALF_NORM)
        factor = tl.where(usable, factor, 0.0)
    half_norm = tl.where(broken > 0, float("inf"), half_norm)
    tl.store(factor_ptr + code, factor, mask=code < K)
    tl.store(half_norm_ptr + code, half_norm.to(tl.float32), mask=code < K)


@triton.jit
def _rows(x_row, d, inside, D, stride_d):
    return tl.load(
        x_row[:, None] + d[None, :].to(tl.int64) * stride_d, mask=inside[:, None] & (d < D)[None, :], other=0.0
    )


@triton.jit(do_not_specialize=["N", "rows", "K"])
def _search_kernel(
    x_ptr,
    codebook_ptr,
    mean_ptr,
    scale_ptr,
    factor_ptr,
    half_norm_ptr,
    index_ptr,
    N,
    rows,
    K,
    D,
    stride_b,
    stride_r,
    stride_d,
    bound_product,
    bound_square,
    METRIC: tl.constexpr,
    EXACT: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    x_row = x_ptr + (n // rows) * stride_b + (n % rows) * stride_r
    column = tl.arange(0, BLOCK_K)
    feature = tl.arange(0, BLOCK_D)

    if METRIC == _L2:
        scale = tl.broadcast_to(tl.load(scale_ptr), (BLOCK_N,))
    else:
        largest_value = tl.zeros((BLOCK_N,), tl.float64)
        for start in range(0, D, BLOCK_D):
            x = _rows(x_row, start + feature, inside, D, stride_d)
            largest_value = tl.maximum(largest_value, tl.max(tl.abs(x), 1).to(tl.float64))
        scale = _power_of_two(largest_value, MOST)
    square = tl.full((BLOCK_N,), _TINY, tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + feature
        x = _centre(
            _rows(x_row, d, inside, D, stride_d),
            tl.load(mean_ptr + d, mask=d < D, other=0.0)[None, :],
            scale[:, None],
        )
        square += tl.sum(x * x, 1)

    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    second = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK_N,), tl.int32)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + column
        half_norm = tl.load(half_norm_ptr + k, mask=k < K, other=float("inf"))
        possible = half_norm < float("inf")
        largest = tl.maximum(largest, tl.where(possible, half_norm, 0.0))
        code_row = codebook_ptr + k.to(tl.int64) * D
        factor = tl.load(factor_ptr + k, mask=k < K, other=0.0)
        score = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + feature
            mean = tl.load(mean_ptr + d, mask=d < D, other=0.0)
            x = _centre(_rows(x_row, d, inside, D, stride_d), mean[None, :], scale[:, None])
            code = tl.load(code_row[None, :] + d[:, None], mask=(d < D)[:, None] & (k < K)[None, :], other=0.0)
            code = _centre(code, mean[:, None], factor[None, :])
            score = tl.dot(x, code, score, input_precision="ieee")
        if METRIC == _L2:
            score -= half_norm[None, :]
        score = tl.where(possible[None, :] & (score == score), score, float("-inf"))

        top, at = tl.max(score, 1, return_indices=True)
        next_top = tl.max(tl.where(column[None, :] == at[:, None], float("-inf"), score), 1)
        second = tl.maximum(tl.maximum(second, next_top), tl.minimum(best, top))
        index = tl.where(top > best, first + at, index)
        best = tl.maximum(best, top)

    norm = tl.sqrt(square)
    radius = tl.sqrt(2 * tl.max(largest, 0) + _TINY)
    reach = norm * radius + radius * radius
    bound = bound_product * norm * radius + bound_square * radius * radius
    # False where the row holds a NaN or an infinity: it, too, is left to the decide kernel.
    if EXACT:
        index = tl.where((best - second > 2 * bound) & (reach < _HUGE), index, -1)
    else:
        index = tl.where(tl.abs(best) < float("inf"), index, 0)
    tl.store(index_ptr + n, index.to(tl.int64), mask=inside)


@triton.jit
def _two_sum(a, b):
    """a + b without error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def _two_product(a, b):
    """a * b without error (Dekker, Veltkamp). Not by fma: the interpreter rounds its product."""
    product = a * b
    spread = a * 134217729.0
    a_high = spread - (spread - a)
    spread = b * 134217729.0
    b_high = spread - (spread - b)
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@triton.jit
def _add(a_high, a_low, b_high, b_low):
    total, rest = _two_sum(a_high, b_high)
    return _two_sum(total, rest + (a_low + b_low))


@triton.jit
def _multiply(a_high, a_low, b_high, b_low):
    product, rest = _two_product(a_high, b_high)
    return _two_sum(product, rest + (a_high * b_low + a_low * b_high))


@triton.jit
def _divide(a_high, a_low, b_high, b_low):
    first = a_high / b_high
    high, low = _multiply(first, first * 0.0, b_high, b_low)
    rest, rest_low = _add(a_high, a_low, -high, -low)
    second = rest / b_high
    high, low = _multiply(second, second * 0.0, b_high, b_low)
    rest, rest_low = _add(rest, rest_low, -high, -low)
    return _add(first, second, rest / b_high, first * 0.0)


@triton.jit
def _sum_of_row(high, low, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """Sums over the second dimension, in pairs; WIDTH = 2 ** STEPS."""
    for step in tl.static_range(STEPS):
        high, other_high = tl.split(tl.reshape(high, (ROWS, WIDTH >> (step + 1), 2)))
        low, other_low = tl.split(tl.reshape(low, (ROWS, WIDTH >> (step + 1), 2)))
        high, low = _add(high, low, other_high, other_low)
    return tl.reshape(high, (ROWS,)), tl.reshape(low, (ROWS,))


# Without fusing a * b + c, which would undo what makes a product exact.
@triton.jit(do_not_specialize=["rows", "K"])
def _decide_kernel(
    x_ptr,
    codebook_ptr,
    scale_ptr,
    index_ptr,
    rows,
    K,
    D,
    stride_b,
    stride_r,
    stride_d,
    METRIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The nearest code of one row in twice float64, if the search left it open: the lowest index of equal ones."""
    n = tl.program_id(0).to(tl.int64)
    if tl.load(index_ptr + n) < 0:
        x_row = x_ptr + (n // rows) * stride_b + (n % rows) * stride_r
        scale = tl.load(scale_ptr)
        scale_x = scale
        if METRIC != _L2:
            largest = tl.full((), 0.0, tl.float64)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                x = tl.load(x_row + d.to(tl.int64) * stride_d, mask=d < D, other=0.0).to(tl.float64)
                largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
            scale_x = _power_of_two(largest, 1000)
        most = tl.full((), float("-inf"), tl.float64)
        most_low = tl.full((), 0.0, tl.float64)
        index = tl.full((), 0, tl.int32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            code_row = codebook_ptr + k.to(tl.int64) * D
            scale_c = tl.zeros((BLOCK_K,), tl.float64) + scale
            if METRIC == _COSINE:
                largest_c = tl.zeros((BLOCK_K,), tl.float64)
                for start in range(0, D, BLOCK_D):
                    d = start + tl.arange(0, BLOCK_D)
                    code = tl.load(
                        code_row[:, None] + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0
                    ).to(tl.float64)
                    largest_c = tl.maximum(largest_c, tl.max(tl.abs(code), 1))
                scale_c = _power_of_two(largest_c, 1000)
            sum_high = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
            sum_low = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
            square_high = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
            square_low = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                x = tl.load(x_row + d.to(tl.int64) * stride_d, mask=d < D, other=0.0).to(tl.float64) * scale_x
                code = tl.load(code_row[:, None] + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(
                    tl.float64
                )
                code *= scale_c[:, None]
                x = x[None, :] + code * 0.0
                if METRIC == _L2:
                    high, low = _two_sum(x, -code)
                    square, rest = _two_product(high, high)
                    sum_high, sum_low = _add(sum_high, sum_low, square, rest + 2 * high * low)
                else:
                    product, rest = _two_product(x, code)
                    sum_high, sum_low = _add(sum_high, sum_low, product, rest)
                if METRIC == _COSINE:
                    product, rest = _two_product(code, code)
                    square_high, square_low = _add(square_high, square_low, product, rest)
            worth, low = _sum_of_row(sum_high, sum_low, BLOCK_D, BLOCK_K, STEPS)
            if METRIC == _L2:
                worth, low = -worth, -low
            if METRIC == _COSINE:
                norm, norm_low = _sum_of_row(square_high, square_low, BLOCK_D, BLOCK_K, STEPS)
                sign = tl.where(worth < 0, -1.0, 1.0)
                worth, low = _multiply(worth, low, worth, low)
                # A zero code has the cosine 0, and none with a row that is not finite.
                worth, low = _divide(worth, low, tl.where(norm == 0, 1.0, norm), norm_low)
                worth, low = sign * worth, sign * low
            # Not a number is worth nothing; so is what lies beyond the codebook.
            usable = (tl.abs(worth) < float("inf")) & (k < K)
            worth, low = tl.where(usable, worth, float("-inf")), tl.where(usable, low, 0.0)
            top = tl.max(worth, 0)
            top_low = tl.max(tl.where(worth == top, low, float("-inf")), 0)
            slack = 0.0
            if METRIC == _COSINE:
                slack = _EQUAL_COSINES
            behind = (top - worth) + (top_low - low)
            at = tl.min(tl.where(usable & (behind <= slack * tl.abs(top)), k, 2147483647), 0)
            ahead = (top - most) + (top_low - most_low)
            # The first of finite worth leads -inf by infinity.
            taken = (top > float("-inf")) & (ahead > slack * tl.where(tl.abs(most) < float("inf"), tl.abs(most), 0.0))
            index = tl.where(taken, at, index)
            most_low = tl.where(taken, top_low, most_low)
            most = tl.where(taken, top, most)
        tl.store(index_ptr + n, index.to(tl.int64))


def search(x: Tensor, codebook: Tensor, metric: str = "l2", exact: bool = True) -> tuple[Tensor, Tensor]:
    """First pass: the index of each row that it can prove, -1 for the others (none if not `exact`); and the scale."""
    batch, rows, _ = x.shape
    N, (K, D) = batch * rows, codebook.shape
    mean = torch.empty(D, dtype=torch.float32, device=x.device)
    scale = torch.empty(1, dtype=torch.float64, device=x.device)
    factor = torch.empty(K, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    half_norm = torch.empty(K, dtype=torch.float32, device=x.device)
    index = torch.empty(N, dtype=torch.int64, device=x.device)
    sample_step = triton.cdiv(K, _SAMPLES)
    # float32 holds no larger power of two; its rows and codes are multiplied in it.
    common = dict(METRIC=_METRICS[metric], MOST=1000 if x.dtype == torch.float64 else 120)
    _prepare_kernel[(triton.cdiv(K, 32),)](
        codebook,
        mean,
        scale,
        factor,
        half_norm,
        K,
        D,
        triton.cdiv(K, sample_step),
        sample_step,
        **common,
        SAMPLES=_SAMPLES,
        BLOCK_K=32,
        BLOCK_D=64,
        **FUSED,
    )
    _search_kernel[(triton.cdiv(N, _BLOCK_N),)](
        x,
        codebook,
        mean,
        scale,
        factor,
        half_norm,
        index,
        N,
        rows,
        K,
        D,
        *x.stride(),
        *_bound(D),
        **common,
        EXACT=exact,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        BLOCK_D=_BLOCK_D,
        num_warps=_WARPS,
        **FUSED,
    )
    return index, scale


def nearest(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, metric: str = "l2", exact: bool = True
) -> tuple[Tensor, Tensor]:
    """x: (batch, rows, D) of any strides; mask: (batch * rows,). (batch * rows,), and how many rows were decided."""
    batch, rows, D = x.shape
    if batch * rows == 0:
        return (torch.empty(size, dtype=torch.int64, device=x.device).zero_() for size in ((0,), ()))
    codebook = codebook.contiguous()
    index, scale = search(x, codebook, metric, exact)
    if mask is not None:
        index.masked_fill_(~mask, 0)
    reranked = (index < 0).sum()
    if exact:
        _decide_kernel[(batch * rows,)](
            x, codebook, scale, index, rows, codebook.shape[0], D, *x.stride(), METRIC=_METRICS[metric], BLOCK_K=32,
            BLOCK_D=16, STEPS=4, **SEPARATE,
        )  # fmt: skip
    if mask is not None:
        index.masked_fill_(~mask, -1)
    return index, reranked
