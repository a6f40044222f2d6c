"""Unpacking in Triton: which token each place has, then a gather; and the sum over what each token covers."""

import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.fusion_triton import FUSED
from vqfast.kernels.pack.triton import blocks

_BLOCK = 128


@triton.jit
def _tokens(cu_seqlens_ptr, T, BLOCK: tl.constexpr):
    """The image of this program, its tokens from the program's first on, and which there are."""
    image = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(cu_seqlens_ptr + image).to(tl.int64), 0)
    end = tl.minimum(tl.load(cu_seqlens_ptr + image + 1).to(tl.int64), T)
    token = begin + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return image, token, token < end


@triton.jit
def _place(positions_ptr, grain_ids_ptr, grains_ptr, image, token, inside, cells_y, cells_x, GRAINS: tl.constexpr):
    """The place of each token's top left on the fine grid of the batch, log2 of the edge it covers, which count."""
    position = tl.load(positions_ptr + token, mask=inside, other=-1)
    grain = tl.load(grain_ids_ptr + token, mask=inside, other=-1)
    counts = inside & (grain >= 0) & (grain < GRAINS)
    grain = tl.where(counts, grain, 0)
    columns = (cells_x + tl.zeros_like(grain)) << grain
    counts = counts & (position >= 0) & (position < columns * (cells_y << grain))
    position = tl.where(counts, position, 0)
    y, x = position // columns, position % columns
    cell = (image * cells_y + (y >> grain)) * cells_x + (x >> grain)
    counts = counts & (tl.load(grains_ptr + cell, mask=counts, other=-1) == grain)
    shift = GRAINS - 1 - grain
    width = cells_x << (GRAINS - 1)
    place = image * (cells_y << (GRAINS - 1)) * width + (y << shift) * width + (x << shift)
    return place, shift, counts


@triton.jit(do_not_specialize=["T", "cells_y", "cells_x"])
def _slots_kernel(
    cu_seqlens_ptr, positions_ptr, grain_ids_ptr, grains_ptr, slots_ptr, T, cells_y, cells_x, GRAINS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image, token, inside = _tokens(cu_seqlens_ptr, T, BLOCK)
    place, _, counts = _place(positions_ptr, grain_ids_ptr, grains_ptr, image, token, inside, cells_y, cells_x, GRAINS)
    # 0 is no token. The later of two at one place counts, in whatever order programs run.
    tl.atomic_max(slots_ptr + place, token + 1, mask=counts, sem="relaxed")


@triton.jit(do_not_specialize=["positions", "cells_y", "cells_x", "D"])
def _grid_kernel(
    values_ptr, slots_ptr, grains_ptr, grid_ptr, positions, cells_y, cells_x, D, stride_t, stride_d,
    GRAINS: tl.constexpr, REPLICATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < positions
    width, height = cells_x << (GRAINS - 1), cells_y << (GRAINS - 1)
    x, y, image = n % width, n // width % height, n // width // height
    cell = (image * cells_y + (y >> (GRAINS - 1))) * cells_x + (x >> (GRAINS - 1))
    grain = tl.load(grains_ptr + cell, mask=inside, other=0)
    shift = GRAINS - 1 - tl.minimum(tl.maximum(grain, 0), GRAINS - 1)
    top, left = y >> shift << shift, x >> shift << shift
    slot = tl.load(slots_ptr + (image * height + top) * width + left, mask=inside, other=0) - 1
    there = inside & (slot >= 0)
    if not REPLICATE:
        there = there & (top == y) & (left == x)
    for d0 in range(0, D, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)
        used = (d < D)[None, :]
        value = tl.load(
            values_ptr + slot[:, None] * stride_t + d[None, :] * stride_d, mask=there[:, None] & used, other=0
        )
        tl.store(grid_ptr + n[:, None] * D + d[None, :], value, mask=inside[:, None] & used)


@triton.jit(do_not_specialize=["T", "cells_y", "cells_x", "rows", "D"])
def _sum_kernel(
    grad_ptr, cu_seqlens_ptr, positions_ptr, grain_ids_ptr, grains_ptr, slots_ptr, out_ptr, T, cells_y, cells_x,
    rows, D, stride_b, stride_r, stride_d, GRAINS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    image, token, inside = _tokens(cu_seqlens_ptr, T, BLOCK)
    place, shift, counts = _place(
        positions_ptr, grain_ids_ptr, grains_ptr, image, token, inside, cells_y, cells_x, GRAINS
    )
    counts = counts & (tl.load(slots_ptr + place, mask=counts, other=0) == token + 1)
    dtype: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    width = cells_x << (GRAINS - 1)
    for d0 in range(0, D, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)
        used = (d < D)[None, :]
        total = tl.zeros((BLOCK, BLOCK_D), dtype)
        for square in range(0, 1 << (2 * (GRAINS - 1))):
            covered = counts & (square < (1 << (2 * shift)))
            n = place + (square >> shift) * width + (square & ((1 << shift) - 1))
            row_ptr = grad_ptr + n // rows * stride_b + n % rows * stride_r
            value = tl.load(row_ptr[:, None] + d[None, :] * stride_d, mask=covered[:, None] & used, other=0.0)
            total += value.to(dtype)
        tl.store(
            out_ptr + token[:, None] * D + d[None, :], total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & used
        )


def _slots(
    cu_seqlens: Tensor, positions: Tensor, grain_ids: Tensor, grains: Tensor, num_grains: int
) -> tuple[Tensor, int]:
    """slots (B * Hf * Wf,), and how many programs take the tokens of an image."""
    B, cells_y, cells_x = grains.shape
    per_image = cells_y * cells_x * 4 ** (num_grains - 1)
    slots = grains.new_zeros(B * per_image)
    T = positions.shape[0]
    # An image has no more tokens than places.
    programs = triton.cdiv(max(min(T, per_image), 1), _BLOCK)
    if T and B:
        _slots_kernel[(B, programs)](
            cu_seqlens,
            positions,
            grain_ids,
            grains,
            slots,
            T,
            cells_y,
            cells_x,
            GRAINS=num_grains,
            BLOCK=_BLOCK,
            **FUSED,
        )
    return slots, programs


def unpack(
    values: Tensor, cu_seqlens: Tensor, positions: Tensor, grain_ids: Tensor, grains: Tensor, num_grains: int,
    replicate: bool,
) -> Tensor:  # fmt: skip
    """values: (T, D) of any strides. Returns (B * Hf * Wf, D)."""
    cu_seqlens, positions, grain_ids = cu_seqlens.contiguous(), positions.contiguous(), grain_ids.contiguous()
    grains, D = grains.contiguous(), values.shape[1]
    slots, _ = _slots(cu_seqlens, positions, grain_ids, grains, num_grains)
    grid = values.new_empty((slots.shape[0], D))
    if grid.numel():
        block_n, block_d = blocks(D)
        _grid_kernel[(triton.cdiv(slots.shape[0], block_n),)](
            values, slots, grains, grid, slots.shape[0], *grains.shape[1:], D, *values.stride(),
            GRAINS=num_grains, REPLICATE=replicate, BLOCK_N=block_n, BLOCK_D=block_d, **FUSED,
        )  # fmt: skip
    return grid


def unpack_backward(
    grad: Tensor, cu_seqlens: Tensor, positions: Tensor, grain_ids: Tensor, grains: Tensor, num_grains: int
) -> Tensor:
    """grad: (batch, rows, D) of any strides, the positions of the fine grid. Returns (T, D)."""
    cu_seqlens, positions, grain_ids = cu_seqlens.contiguous(), positions.contiguous(), grain_ids.contiguous()
    grains, (T, D) = grains.contiguous(), (positions.shape[0], grad.shape[-1])
    slots, programs = _slots(cu_seqlens, positions, grain_ids, grains, num_grains)
    # Zeros: tokens of no image are in no program.
    out = grad.new_zeros((T, D))
    if out.numel() and slots.numel():
        _sum_kernel[(grains.shape[0], programs)](
            grad, cu_seqlens, positions, grain_ids, grains, slots, out, T, *grains.shape[1:], max(grad.shape[1], 1), D,
            *grad.stride(), GRAINS=num_grains, BLOCK=_BLOCK, BLOCK_D=min(blocks(D)[1], 8), **FUSED,
        )  # fmt: skip
    return out
