"""Exact nearest-code search in Triton: a float32 pass that proves its own answers, twice float64 for the rest.

The score of a code is s = X.C - |C|^2 / 2 for distances, with X = r (x - mu) and C = r (c - mu); mu is one float32
vector near the middle of the codebook, so that a common offset costs no precision, and r a power of two that brings the
deviations near 1. For products it is X.C with X = r_x x, each row with a power of two of its own, and the same C, for
x.mu is one number for all codes; for cosines c / |c| stands for c. The prepare kernel computes C in float64 and rounds
it once. The search kernel computes s in float32, keeps the best and the second best, and bounds its own error by B (see
`_bound`). A best that leads by more than 2 B is the nearest code of the real numbers; where it does not, the kernel
writes -1 and the decide kernel compares all codes in twice float64 (csrc/include/exact_distance.h).
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
_L2, _DOT, _COSINE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Squares of cosines closer than this, relative to themselves, tie.
_EQUAL_COSINES = tl.constexpr(2.0**-96)

# Below the square root of _TINY norms are rounded up to it, so that B also covers the products that underflow.
_TINY = tl.constexpr(1e-28)
# |x - mu| C + C^2 beyond _HUGE could overflow a score; half norms are stored up to _HUGE_HALF_NORM, which is beyond.
_HUGE = tl.constexpr(1e37)
_HUGE_HALF_NORM = tl.constexpr(1e38)


def _bound(D: int) -> tuple[float, float, float]:
    """(p, q, e) of the bound B on the error of a float32 score, C = max |c - mu|.

    B = p |x - mu| C + q C^2 for distances, p |x| C for products, p |x| C + e r |x| for cosines. With u the unit
    roundoff and g_m = m u / (1 - m u), the bound of m roundings in any order:
        x - mu or x, and c - mu, rounded to float32    2 u |x - mu| C
        D products and their sum, fused or not         g_D |x - mu| C
        the half norm rounded from float64             u C^2 / 2
        the subtraction of the half norm               u (|x - mu| C + C^2 / 2)
        cosines: c / |c| and r (c / |c| - mu) in float64, off by less than (D + 8) 2^-53 r
    g_(D+8) holds the D + 3 of them and the rounding of B itself; |x - mu| comes from a float32 sum of squares, hence
    the factor 1 + g. A hundredth more covers products of the above and underflow (_TINY).
    """
    m = (D + 8) * _UNIT_ROUNDOFF
    if m >= 0.5:
        return (float("inf"),) * 3
    g = m / (1 - m)
    return 1.01 * g * (1 + g), 1.01 * _UNIT_ROUNDOFF, 1.01 * (D + 8) * 2.0**-53


def _most(dtype: torch.dtype) -> int:
    """The largest exponent of a scale: float32 holds no larger power of two, and its rows are multiplied in it."""
    return 1000 if dtype == torch.float64 else 120


@triton.jit
def _power_of_two(largest, MOST: tl.constexpr):
    """The power of two that brings a float64 to [1, 2), its exponent at most MOST; 1 where it is 0, infinite or NaN."""
    exponent = (largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    exponent = tl.minimum(tl.maximum(2046 - exponent, 1023 - MOST), 1023 + MOST)
    power = (exponent << 52).to(tl.float64, bitcast=True)
    return tl.where((largest > 0) & (largest < float("inf")), power, 1.0)


@triton.jit
def _vectors(row, d, inside, D, stride_d):
    return tl.load(
        row[:, None] + d[None, :].to(tl.int64) * stride_d, mask=inside[:, None] & (d < D)[None, :], other=0.0
    )


@triton.jit
def _rows(x_row, d, inside, D, stride_d, mean_ptr, scale, METRIC: tl.constexpr):
    """X as float32: one rounding, of the difference for distances, whatever the dtype of the rows."""
    x = _vectors(x_row, d, inside, D, stride_d)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    if METRIC == _L2:
        x -= tl.load(mean_ptr + d, mask=d < D, other=0.0)[None, :]
    return (x * scale[:, None].to(x.dtype)).to(tl.float32)


@triton.jit
def _unit_length(code_row, inside, D, METRIC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """What the values of each code are multiplied by, one after the other, for unit length: a power of two and the
    inverse of a norm, 0 for a zero code and for one that is not finite. 1 and 1 but for cosines."""
    power, inverse = tl.full((BLOCK_K,), 1.0, tl.float64), tl.full((BLOCK_K,), 1.0, tl.float64)
    if METRIC == _COSINE:
        largest, square = tl.zeros((BLOCK_K,), tl.float64), tl.zeros((BLOCK_K,), tl.float64)
        for start in range(0, D, BLOCK_D):
            values = _vectors(code_row, start + tl.arange(0, BLOCK_D), inside, D, 1).to(tl.float64)
            largest = tl.maximum(largest, tl.max(tl.abs(values), 1))
        power = _power_of_two(largest, 1000)
        for start in range(0, D, BLOCK_D):
            values = _vectors(code_row, start + tl.arange(0, BLOCK_D), inside, D, 1).to(tl.float64) * power[:, None]
            square += tl.sum(values * values, 1)
        inverse = tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    return power, inverse


@triton.jit
def _sampled(row, d, inside, D, power, inverse):
    """Which values of the sampled codes are finite, these values, and their mean as float32."""
    values = _vectors(row, d, inside, D, 1).to(tl.float64) * power[:, None] * inverse[:, None]
    finite = (tl.abs(values) < float("inf")) & (inside & (inverse > 0))[:, None] & (d < D)[None, :]
    values = tl.where(finite, values, 0.0)
    mean = (tl.sum(values, 0) / tl.maximum(tl.sum(finite.to(tl.float64), 0), 1.0)).to(tl.float32)
    return finite, values, tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit(do_not_specialize=["K", "samples", "sample_step"])
def _prepare_kernel(
    codebook_ptr,
    mean_ptr,
    facts_ptr,
    codes_ptr,
    half_norm_ptr,
    K,
    D,
    pitch,
    samples,
    sample_step,
    METRIC: tl.constexpr,
    MOST: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """mu, C, and |C|^2 / 2: +inf beyond K and for a code that holds a NaN or an infinity, which no search can choose.
    Facts: r; for products the largest magnitude in a code that can be chosen, 0 before."""
    sample = tl.arange(0, SAMPLES)
    sample_row, sample_inside = codebook_ptr + sample.to(tl.int64) * sample_step * D, sample < samples
    power, inverse = _unit_length(sample_row, sample_inside, D, METRIC, SAMPLES, BLOCK_D)
    widest = tl.full((), 0.0, tl.float64)
    # Every program takes the same mean and the same scale, to the bit; the first one stores them for the search.
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        finite, values, mean = _sampled(sample_row, d, sample_inside, D, power, inverse)
        deviation = tl.where(finite, tl.abs(values - mean.to(tl.float64)[None, :]), 0.0)
        widest = tl.maximum(widest, tl.max(tl.max(deviation, 1), 0))
        if tl.program_id(0) == 0:
            tl.store(mean_ptr + d, mean, mask=d < D)
    scale = _power_of_two(widest, MOST)
    if tl.program_id(0) == 0:
        tl.store(facts_ptr, scale)

    code = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    code_row, inside = codebook_ptr + code * D, code < K
    own_power, own_inverse = _unit_length(code_row, inside, D, METRIC, BLOCK_K, BLOCK_D)
    broken = tl.zeros((BLOCK_K,), tl.int32)
    largest, square = tl.zeros((BLOCK_K,), tl.float64), tl.zeros((BLOCK_K,), tl.float64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        _, _, mean = _sampled(sample_row, d, sample_inside, D, power, inverse)
        values = _vectors(code_row, d, inside, D, 1).to(tl.float64)
        broken = tl.maximum(broken, tl.max(tl.where(tl.abs(values) < float("inf"), 0, 1), 1))
        largest = tl.maximum(largest, tl.max(tl.abs(values), 1))
        values = values * own_power[:, None] * own_inverse[:, None]
        present = inside[:, None] & (d < D)[None, :]
        centred = tl.where(present, (values - mean.to(tl.float64)[None, :]) * scale, 0.0)
        square += tl.sum(centred * centred, 1)
        tl.store(codes_ptr + code[:, None] * pitch + d[None, :], centred.to(tl.float32), mask=(d < pitch)[None, :])
    # With such a norm nothing is certain.
    half_norm = tl.where(square < 2 * _HUGE_HALF_NORM, 0.5 * square, _HUGE_HALF_NORM)
    half_norm = tl.where(inside & (broken == 0), half_norm, float("inf"))
    tl.store(half_norm_ptr + code, half_norm.to(tl.float32))
    if METRIC == _DOT:
        tl.atomic_max(facts_ptr + 1, tl.max(tl.where(broken > 0, 0.0, largest), 0))


@triton.jit(do_not_specialize=["N", "rows", "K"])
def _search_kernel(
    x_ptr,
    mean_ptr,
    facts_ptr,
    codes_ptr,
    half_norm_ptr,
    index_ptr,
    N,
    rows,
    K,
    D,
    pitch,
    stride_b,
    stride_r,
    stride_d,
    bound_product,
    bound_square,
    bound_unit,
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
        scale = tl.broadcast_to(tl.load(facts_ptr), (BLOCK_N,))
    else:
        largest_value = tl.zeros((BLOCK_N,), tl.float64)
        for start in range(0, D, BLOCK_D):
            x = _vectors(x_row, start + feature, inside, D, stride_d)
            largest_value = tl.maximum(largest_value, tl.max(tl.abs(x), 1).to(tl.float64))
        scale = _power_of_two(largest_value, MOST)
    square = tl.full((BLOCK_N,), _TINY, tl.float32)
    for start in range(0, D, BLOCK_D):
        x = _rows(x_row, start + feature, inside, D, stride_d, mean_ptr, scale, METRIC)
        square += tl.sum(x * x, 1)

    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    second = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK_N,), tl.int32)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + column
        half_norm = tl.load(half_norm_ptr + k)
        possible = half_norm < float("inf")
        largest = tl.maximum(largest, tl.where(possible, half_norm, 0.0))
        code_row = codes_ptr + k.to(tl.int64) * pitch
        score = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + feature
            x = _rows(x_row, d, inside, D, stride_d, mean_ptr, scale, METRIC)
            code = tl.load(code_row[None, :] + d[:, None])
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
    bound = bound_product * norm * radius
    if METRIC == _L2:
        bound += bound_square * radius * radius
    if METRIC == _COSINE:
        bound += bound_unit * tl.load(facts_ptr).to(tl.float32) * norm
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
    facts_ptr,
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
        scale = tl.load(facts_ptr)
        if METRIC == _DOT:
            scale = _power_of_two(tl.load(facts_ptr + 1), 1000)
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


def prepare(codebook: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mu, facts, C and |C|^2 / 2 of a codebook: what `_prepare_kernel` says. In whole tiles, which are read without
    masks: C is (K, D) padded with zeros, the half norms are (K,) padded with +inf."""
    K, D = codebook.shape
    rows, pitch = triton.cdiv(K, _BLOCK_K) * _BLOCK_K, triton.cdiv(D, _BLOCK_D) * _BLOCK_D
    mean = torch.empty(D, dtype=torch.float32, device=codebook.device)
    facts = torch.zeros(2, dtype=torch.float64, device=codebook.device)
    codes = torch.empty(rows, pitch, dtype=torch.float32, device=codebook.device)
    half_norm = torch.empty(rows, dtype=torch.float32, device=codebook.device)
    sample_step = triton.cdiv(K, _SAMPLES)
    _prepare_kernel[(triton.cdiv(rows, 32),)](
        codebook,
        mean,
        facts,
        codes,
        half_norm,
        K,
        D,
        pitch,
        triton.cdiv(K, sample_step),
        sample_step,
        METRIC=_METRICS[metric],
        MOST=_most(codebook.dtype),
        SAMPLES=_SAMPLES,
        BLOCK_K=32,
        BLOCK_D=32,
        num_warps=8,
        **FUSED,
    )
    return mean, facts, codes, half_norm


def search(x: Tensor, codebook: Tensor, metric: str = "l2", exact: bool = True) -> tuple[Tensor, Tensor]:
    """First pass: the index of each row that it can prove, -1 for the others (none if not `exact`); and the facts."""
    batch, rows, _ = x.shape
    N, (K, D) = batch * rows, codebook.shape
    mean, facts, codes, half_norm = prepare(codebook, metric)
    index = torch.empty(N, dtype=torch.int64, device=x.device)
    _search_kernel[(triton.cdiv(N, _BLOCK_N),)](
        x,
        mean,
        facts,
        codes,
        half_norm,
        index,
        N,
        rows,
        K,
        D,
        codes.stride(0),
        *x.stride(),
        *_bound(D),
        METRIC=_METRICS[metric],
        MOST=_most(x.dtype),
        EXACT=exact,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        BLOCK_D=_BLOCK_D,
        num_warps=_WARPS,
        **FUSED,
    )
    return index, facts


def nearest(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, metric: str = "l2", exact: bool = True
) -> tuple[Tensor, Tensor]:
    """x: (batch, rows, D) of any strides; mask: (batch * rows,). (batch * rows,), and how many rows were decided."""
    batch, rows, D = x.shape
    if batch * rows == 0:
        return (torch.empty(size, dtype=torch.int64, device=x.device).zero_() for size in ((0,), ()))
    codebook = codebook.contiguous()
    index, facts = search(x, codebook, metric, exact)
    if mask is not None:
        index.masked_fill_(~mask, 0)
    reranked = (index < 0).sum()
    if exact:
        _decide_kernel[(batch * rows,)](
            x, codebook, facts, index, rows, codebook.shape[0], D, *x.stride(), METRIC=_METRICS[metric], BLOCK_K=32,
            BLOCK_D=16, STEPS=4, **SEPARATE,
        )  # fmt: skip
    if mask is not None:
        index.masked_fill_(~mask, -1)
    return index, reranked
