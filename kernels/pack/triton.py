"""Packing in Triton: token counts of each row of cells, then a program a row of cells, then the tail."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.fusion_triton import FUSED

_TAIL_BLOCK = 1024


@triton.jit(do_not_specialize=["cells_y", "cells_x"])
def _pack_rows_kernel(
    grains_ptr, table_ptr, lengths_ptr, cells_y, cells_x, GRAINS: tl.constexpr, BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):  # fmt: skip
    """table (B, G, Hc): tokens of the image before those of this grain in this row of cells. lengths (B,)."""
    image = tl.program_id(0).to(tl.int64)
    map_ptr = grains_ptr + image * cells_y * cells_x
    before = tl.full((), 0, tl.int64)
    for g in tl.static_range(GRAINS):
        for y0 in range(0, cells_y, BLOCK_Y):
            y = y0 + tl.arange(0, BLOCK_Y)
            count = tl.zeros((BLOCK_Y,), tl.int64)
            for x0 in range(0, cells_x, BLOCK_X):
                x = x0 + tl.arange(0, BLOCK_X)
                inside = (y < cells_y)[:, None] & (x < cells_x)[None, :]
                grain = tl.load(map_ptr + y[:, None] * cells_x + x[None, :], mask=inside, other=0)
                grain = tl.minimum(tl.maximum(grain, 0), GRAINS - 1)
                count += tl.sum(tl.where(inside & (grain == g), 1, 0).to(tl.int64), 1)
            tokens = count << (2 * g)
            start = before + tl.cumsum(tokens, 0) - tokens
            tl.store(table_ptr + (image * GRAINS + g) * cells_y + y, start, mask=y < cells_y)
            before += tl.sum(tokens, 0)
    tl.store(lengths_ptr + image, before)


@triton.jit(do_not_specialize=["images", "cells_y", "cells_x", "capacity", "rows", "D"])
def _pack_cells_kernel(
    values_ptr, grains_ptr, table_ptr, lengths_ptr, packed_ptr, cu_seqlens_ptr, positions_ptr, grain_ids_ptr,
    images, cells_y, cells_x, capacity, rows, D, stride_b, stride_r, stride_d,
    GRAINS: tl.constexpr, REGION: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    image, cy = tl.program_id(0).to(tl.int64) // cells_y, tl.program_id(0).to(tl.int64) % cells_y
    sequence = tl.full((), 0, tl.int64)
    for b0 in range(0, image, 64):
        b = b0 + tl.arange(0, 64)
        sequence += tl.sum(tl.load(lengths_ptr + b, mask=b < image, other=0), 0)
    if cy == 0:
        end = sequence + tl.load(lengths_ptr + image)
        tl.store(cu_seqlens_ptr + image + 1, tl.minimum(end, capacity).to(tl.int32))
        if image == 0:
            tl.store(cu_seqlens_ptr, 0)
    map_ptr = grains_ptr + (image * cells_y + cy) * cells_x
    width = cells_x << (GRAINS - 1)
    first = image * (cells_y << (GRAINS - 1)) * width
    for g in tl.static_range(GRAINS):
        edge = 1 << g
        shift = GRAINS - 1 - g
        in_row = tl.full((), 0, tl.int64)
        for x0 in range(0, cells_x, BLOCK_X):
            cx = x0 + tl.arange(0, BLOCK_X)
            grain = tl.load(map_ptr + cx, mask=cx < cells_x, other=0)
            same = (cx < cells_x) & (tl.minimum(tl.maximum(grain, 0), GRAINS - 1) == g)
            in_row += tl.sum(same.to(tl.int64), 0)
        start = sequence + tl.load(table_ptr + (image * GRAINS + g) * cells_y + cy)
        for i in range(0, edge):
            rank = tl.full((), 0, tl.int64)
            for c0 in range(0, cells_x * edge, BLOCK_X):
                c = c0 + tl.arange(0, BLOCK_X)
                cx, j = c // edge, c % edge
                grain = tl.load(map_ptr + cx, mask=cx < cells_x, other=0)
                same = (cx < cells_x) & (tl.minimum(tl.maximum(grain, 0), GRAINS - 1) == g)
                # Codes of this grain before each one in its row.
                member = same.to(tl.int64)
                before = rank + tl.cumsum(member, 0) - member
                rank += tl.sum(member, 0)
                if REGION:
                    token = start + (before - j) * edge + i * edge + j
                else:
                    token = start + i * in_row * edge + before
                kept = same & (token < capacity)
                y, x = cy * edge + i, c.to(tl.int64)
                tl.store(positions_ptr + token, y * (cells_x * edge) + x, mask=kept)
                tl.store(grain_ids_ptr + token, tl.full((BLOCK_X,), g, tl.int64), mask=kept)
                n = first + (y << shift) * width + (x << shift)
                row_ptr = values_ptr + n // rows * stride_b + n % rows * stride_r
                for d0 in range(0, D, BLOCK_D):
                    d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)
                    used = kept[:, None] & (d < D)[None, :]
                    value = tl.load(row_ptr[:, None] + d[None, :] * stride_d, mask=used)
                    tl.store(packed_ptr + token[:, None] * D + d[None, :], value, mask=used)


@triton.jit(do_not_specialize=["images", "capacity", "D"])
def _pack_tail_kernel(
    packed_ptr, cu_seqlens_ptr, positions_ptr, grain_ids_ptr, images, capacity, D, BLOCK: tl.constexpr
):
    used = tl.load(cu_seqlens_ptr + images).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), packed_ptr.dtype.element_ty)
    tl.store(packed_ptr + i, zero, mask=(i >= used * D) & (i < capacity * D))
    none = tl.full((BLOCK,), -1, tl.int64)
    tl.store(positions_ptr + i, none, mask=(i >= used) & (i < capacity))
    tl.store(grain_ids_ptr + i, none, mask=(i >= used) & (i < capacity))


def blocks(D: int) -> tuple[int, int]:
    """(positions, features) of a tile: 8 elements for each of 128 threads, fewer where there is one feature."""
    features = min(triton.next_power_of_2(max(D, 1)), 64)
    return max(1024 // features // 4, 16), features


def pack(
    values: Tensor, grains: Tensor, num_grains: int, region: bool, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values: (batch, rows, D) of any strides, the positions of the fine grid; grains: (B, Hc, Wc)."""
    grains, D = grains.contiguous(), values.shape[-1]
    B, cells_y, cells_x = grains.shape
    packed = values.new_empty((capacity, D))
    cu_seqlens = grains.new_zeros(B + 1, dtype=torch.int32)
    positions, grain_ids = grains.new_empty(capacity), grains.new_empty(capacity)
    if B:
        table, lengths = grains.new_empty((B, num_grains, cells_y)), grains.new_empty(B)
        _pack_rows_kernel[(B,)](
            grains, table, lengths, cells_y, cells_x, GRAINS=num_grains, BLOCK_Y=32, BLOCK_X=32, **FUSED
        )
        _pack_cells_kernel[(B * cells_y,)](
            values, grains, table, lengths, packed, cu_seqlens, positions, grain_ids,
            B, cells_y, cells_x, capacity, max(values.shape[1], 1), D, *values.stride(),
            GRAINS=num_grains, REGION=region, BLOCK_X=32, BLOCK_D=blocks(D)[1], **FUSED,
        )  # fmt: skip
    if capacity:
        _pack_tail_kernel[(triton.cdiv(capacity * max(D, 1), _TAIL_BLOCK),)](
            packed, cu_seqlens, positions, grain_ids, B, capacity, D, BLOCK=_TAIL_BLOCK, **FUSED
        )
    return packed, cu_seqlens, positions, grain_ids
