"""Codebook statistics in Triton: rows sorted by code, then each code adds its own rows in their order.

No float atomics and no one-hot matrix: a program owns a slice of one code's rows (and some features), so the bits of a
sum depend on the shapes alone. Sums are float64 until they are stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.fusion_triton import FUSED

_BLOCK_N = 16
# A codebook of fewer codes than this cuts the rows of each code into slices, to give every processor a part; a slice
# is worth its launch from about _SLICE_ROWS rows on.
_PROGRAMS = 1024
_SLICE_ROWS = 256


@triton.jit(do_not_specialize=["rows", "K"])
def _segment_sum_kernel(
    x_ptr,
    weights_ptr,
    order_ptr,
    bounds_ptr,
    counts_ptr,
    sums_ptr,
    rows,
    K,
    D,
    stride_b,
    stride_r,
    stride_d,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    code = tl.program_id(0).to(tl.int64)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    part = tl.program_id(2)
    first, last = tl.load(bounds_ptr + code), tl.load(bounds_ptr + code + 1)
    slice_rows = (last - first + SLICES - 1) // SLICES
    first += part * slice_rows
    last = tl.minimum(first + slice_rows, last)

    # The outputs are zero already: most programs of a large codebook end here.
    if first < last:
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
        count = tl.zeros((BLOCK_N,), tl.float64)
        for start in range(first, last, BLOCK_N):
            position = start + tl.arange(0, BLOCK_N)
            inside = position < last
            n = tl.load(order_ptr + position, mask=inside, other=0)
            x_row = x_ptr + (n // rows) * stride_b + (n % rows) * stride_r
            used = inside[:, None] & (d < D)[None, :]
            x = tl.load(x_row[:, None] + d[None, :] * stride_d, mask=used, other=0.0).to(tl.float64)
            if WEIGHTED:
                weight = tl.load(weights_ptr + n, mask=inside, other=0.0).to(tl.float64)
                total += x * weight[:, None]
                count += weight
            else:
                total += x
                count += tl.where(inside, 1.0, 0.0)
        slot = part * K + code
        tl.store(sums_ptr + slot * D + d, tl.sum(total, 0).to(sums_ptr.dtype.element_ty), mask=d < D)
        if tl.program_id(1) == 0:
            tl.store(counts_ptr + slot, tl.sum(count, 0).to(counts_ptr.dtype.element_ty))


def codebook_stats(x: Tensor, indices: Tensor, weights: Tensor | None, codebook_size: int) -> tuple[Tensor, Tensor]:
    """x: (batch, rows, D) of any strides; indices, weights: (batch * rows,)."""
    rows, D = x.shape[1:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if indices.numel() == 0:
        return x.new_zeros(codebook_size, dtype=dtype), x.new_zeros((codebook_size, D), dtype=dtype)
    # Codes fit 32 bits, which halves the passes of the sort. Masked rows come first and belong to no segment.
    ordered, order = torch.sort(indices.to(torch.int32), stable=True)
    codes = torch.arange(codebook_size + 1, dtype=torch.int32, device=x.device)
    bounds = torch.searchsorted(ordered, codes)
    wanted = min(triton.cdiv(_PROGRAMS, codebook_size), triton.cdiv(indices.numel(), _SLICE_ROWS), 64)
    slices = triton.next_power_of_2(wanted)
    partial = torch.float64 if slices > 1 else dtype
    counts = torch.zeros((slices, codebook_size), dtype=partial, device=x.device)
    sums = torch.zeros((slices, codebook_size, D), dtype=partial, device=x.device)
    block_d = min(max(16, triton.next_power_of_2(D)), 128)
    _segment_sum_kernel[(codebook_size, triton.cdiv(D, block_d), slices)](
        x,
        None if weights is None else weights.contiguous(),
        order,
        bounds,
        counts,
        sums,
        rows,
        codebook_size,
        D,
        *x.stride(),
        SLICES=slices,
        BLOCK_N=_BLOCK_N,
        BLOCK_D=block_d,
        WEIGHTED=weights is not None,
        **FUSED,
    )
    if slices == 1:
        return counts[0], sums[0]
    return counts.sum(0).to(dtype), sums.sum(0).to(dtype)
