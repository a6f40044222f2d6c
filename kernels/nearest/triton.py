"""Exact nearest-code search in Triton: a float32 pass that proves its own answers, float64 for the rest.

The score of a code is s = (x - mu).(c - mu) - |c - mu|^2 / 2, largest for the nearest code; mu is one float32 vector
near the middle of the codebook, so that a common offset costs no precision. The search kernel computes s in float32,
keeps the best and the second best, and bounds its own error by B (see `_bound`). A best that leads by more than 2 B is
the nearest code of the real numbers; where it does not, the kernel writes -1 and the decide kernel finds the index
from float64 differences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N, _BLOCK_K, _BLOCK_D, _WARPS = 64, 64, 16, 4
# How many codes, evenly spaced, mu is the mean of. Any mu is right; a better centre would certify few rows more.
_SAMPLES = 32
_UNIT_ROUNDOFF = 2.0**-24

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
    g_(D+8) holds the D + 3 of them and the rounding of B itself; |x - mu| comes from a float32 sum of squares, hence
    the factor 1 + g. A hundredth more covers products of the above and underflow (_TINY).
    """
    m = (D + 8) * _UNIT_ROUNDOFF
    if m >= 0.5:
        return float("inf"), float("inf")
    g = m / (1 - m)
    return 1.01 * g * (1 + g), 1.01 * _UNIT_ROUNDOFF


@triton.jit
def _centre(values, mean):
    """values - mean as float32: one rounding of the difference, whatever the dtype of the values."""
    if values.dtype == tl.float64:
        return (values - mean.to(tl.float64)).to(tl.float32)
    else:
        return values.to(tl.float32) - mean


@triton.jit(do_not_specialize=["K", "samples", "sample_step"])
def _prepare_kernel(
    codebook_ptr,
    mean_ptr,
    half_norm_ptr,
    K,
    D,
    samples,
    sample_step,
    SAMPLES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """mu and |c - mu|^2 / 2 of each code: +inf for one that holds a NaN or an infinity, which no search can choose."""
    code = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    sample = tl.arange(0, SAMPLES)
    square = tl.zeros((BLOCK_K,), tl.float64)
    broken = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        sampled = tl.load(
            codebook_ptr + (sample.to(tl.int64) * sample_step)[:, None] * D + d[None, :],
            mask=(sample < samples)[:, None] & (d < D)[None, :],
            other=0.0,
        ).to(tl.float64)
        sampled = tl.where(tl.abs(sampled) < float("inf"), sampled, 0.0)
        # Every program takes the same mean, to the bit; the first one stores it for the search.
        mean = (tl.sum(sampled, 0) / samples).to(tl.float32)
        if tl.program_id(0) == 0:
            tl.store(mean_ptr + d, mean, mask=d < D)
        values = tl.load(
            codebook_ptr + code[:, None] * D + d[None, :],
            mask=(code < K)[:, None] & (d < D)[None, :],
            other=0.0,
        ).to(tl.float64)
        broken = tl.maximum(broken, tl.max(tl.where(tl.abs(values) < float("inf"), 0, 1), 1))
        difference = tl.where((code < K)[:, None], values - mean.to(tl.float64)[None, :], 0.0)
        square += tl.sum(difference * difference, 1)
    half_norm = tl.where(square < 2 * _HUGE_HALF_NORM, 0.5 * square, _HUGE_HALF_NORM)
    half_norm = tl.where(broken > 0, float("inf"), half_norm)
    tl.store(half_norm_ptr + code, half_norm.to(tl.float32), mask=code < K)


@triton.jit
def _centred_rows(x_row, mean_ptr, d, inside, D, stride_d):
    values = tl.load(
        x_row[:, None] + d[None, :].to(tl.int64) * stride_d, mask=inside[:, None] & (d < D)[None, :], other=0.0
    )
    return _centre(values, tl.load(mean_ptr + d, mask=d < D, other=0.0)[None, :])


@triton.jit(do_not_specialize=["N", "rows", "K"])
def _search_kernel(
    x_ptr,
    codebook_ptr,
    mean_ptr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    x_row = x_ptr + (n // rows) * stride_b + (n % rows) * stride_r
    column = tl.arange(0, BLOCK_K)
    feature = tl.arange(0, BLOCK_D)

    square = tl.full((BLOCK_N,), _TINY, tl.float32)
    for start in range(0, D, BLOCK_D):
        x = _centred_rows(x_row, mean_ptr, start + feature, inside, D, stride_d)
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
        score = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + feature
            x = _centred_rows(x_row, mean_ptr, d, inside, D, stride_d)
            code = tl.load(code_row[None, :] + d[:, None], mask=(d < D)[:, None] & (k < K)[None, :], other=0.0)
            code = _centre(code, tl.load(mean_ptr + d, mask=d < D, other=0.0)[:, None])
            score = tl.dot(x, code, score, input_precision="ieee")
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
    certified = (best - second > 2 * bound) & (reach < _HUGE)
    tl.store(index_ptr + n, tl.where(certified, index, -1).to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["rows", "K"])
def _decide_kernel(
    x_ptr,
    codebook_ptr,
    index_ptr,
    rows,
    K,
    D,
    stride_b,
    stride_r,
    stride_d,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """argmin of the float64 distances of one row, if the search left it open: the lowest index of equal ones."""
    n = tl.program_id(0).to(tl.int64)
    if tl.load(index_ptr + n) < 0:
        x_row = x_ptr + (n // rows) * stride_b + (n % rows) * stride_r
        nearest = tl.full((), float("inf"), tl.float64)
        index = tl.full((), 0, tl.int32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            code_row = codebook_ptr + k.to(tl.int64) * D
            square = tl.zeros((BLOCK_K, BLOCK_D), tl.float64)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                x = tl.load(x_row + d.to(tl.int64) * stride_d, mask=d < D, other=0.0).to(tl.float64)
                code = tl.load(code_row[:, None] + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(
                    tl.float64
                )
                difference = tl.where((d < D)[None, :], x[None, :] - code, 0.0)
                square += difference * difference
            distance = tl.sum(square, 1)
            # Not a number counts as infinite; so does what lies beyond the codebook.
            distance = tl.where((distance == distance) & (k < K), distance, float("inf"))
            closest, at = tl.min(distance, 0, return_indices=True)
            index = tl.where(closest < nearest, first + at, index)
            nearest = tl.minimum(nearest, closest)
        tl.store(index_ptr + n, index.to(tl.int64))


def search(x: Tensor, codebook: Tensor) -> Tensor:
    """First pass: the index of each row that it can prove, -1 for the others."""
    batch, rows, _ = x.shape
    N, (K, D) = batch * rows, codebook.shape
    mean = torch.empty(D, dtype=torch.float32, device=x.device)
    half_norm = torch.empty(K, dtype=torch.float32, device=x.device)
    index = torch.empty(N, dtype=torch.int64, device=x.device)
    sample_step = triton.cdiv(K, _SAMPLES)
    _prepare_kernel[(triton.cdiv(K, 32),)](
        codebook,
        mean,
        half_norm,
        K,
        D,
        triton.cdiv(K, sample_step),
        sample_step,
        SAMPLES=_SAMPLES,
        BLOCK_K=32,
        BLOCK_D=64,
    )
    _search_kernel[(triton.cdiv(N, _BLOCK_N),)](
        x,
        codebook,
        mean,
        half_norm,
        index,
        N,
        rows,
        K,
        D,
        *x.stride(),
        *_bound(D),
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        BLOCK_D=_BLOCK_D,
        num_warps=_WARPS,
    )
    return index


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """x: (batch, rows, D) of any strides; returns (batch * rows,)."""
    batch, rows, D = x.shape
    if batch * rows == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    codebook = codebook.contiguous()
    index = search(x, codebook)
    _decide_kernel[(batch * rows,)](x, codebook, index, rows, codebook.shape[0], D, *x.stride(), BLOCK_K=32, BLOCK_D=64)
    return index
