"""The mask over the next position in Triton: a program an image, every position compared with every token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.fusion_triton import FUSED


@triton.jit(do_not_specialize=["L", "cells_y", "cells_x", "V"])
def _position_mask_kernel(
    positions_ptr, grain_ids_ptr, grain_ptr, mask_ptr, L, cells_y, cells_x, V, GRAINS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    grain = tl.minimum(tl.maximum(tl.load(grain_ptr + image), 0), GRAINS - 1)
    columns = (cells_x + tl.zeros_like(grain)) << grain
    count = columns * (cells_y << grain)
    ended = tl.full((), 0, tl.int32)
    for l0 in range(0, L, BLOCK_L):
        l = l0 + tl.arange(0, BLOCK_L)
        token = tl.load(positions_ptr + image * L + l, mask=l < L, other=-1)
        token_grain = tl.load(grain_ids_ptr + image * L + l, mask=l < L, other=-1)
        ended += tl.sum(((token_grain == grain) & (token == count + 1)).to(tl.int32), 0)
    unfinished = tl.full((), 0, tl.int32)
    for p0 in range(0, V, BLOCK_P):
        p = (p0 + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = p < count
        cell = (p // columns >> grain) * cells_x + (p % columns >> grain)
        drawn = tl.zeros((BLOCK_P,), tl.int32)
        taken = tl.zeros((BLOCK_P,), tl.int32)
        begun = tl.zeros((BLOCK_P,), tl.int32)
        for l0 in range(0, L, BLOCK_L):
            l = l0 + tl.arange(0, BLOCK_L)
            token = tl.load(positions_ptr + image * L + l, mask=l < L, other=-1)
            token_grain = tl.load(grain_ids_ptr + image * L + l, mask=l < L, other=-1)
            real = (token_grain >= 0) & (token_grain < GRAINS)
            token_grain = tl.where(real, token_grain, 0)
            token_columns = (cells_x + tl.zeros_like(token_grain)) << token_grain
            real = real & (token >= 0) & (token < token_columns * (cells_y << token_grain))
            token = tl.where(real, token, 0)
            token_cell = (token // token_columns >> token_grain) * cells_x + (token % token_columns >> token_grain)
            own = real & (token_grain == grain)
            here = token_cell[None, :] == cell[:, None]
            drawn += tl.sum((own[None, :] & (token[None, :] == p[:, None])).to(tl.int32), 1)
            taken += tl.sum(((real & (token_grain != grain))[None, :] & here).to(tl.int32), 1)
            begun += tl.sum((own[None, :] & here).to(tl.int32), 1)
        free = inside & (drawn == 0) & (taken == 0)
        unfinished += tl.sum((free & ((begun > 0) | (grain == GRAINS - 1))).to(tl.int32), 0)
        # All positions come before eos, so that what is unfinished is known when eos is written.
        allowed = tl.where(ended > 0, p == count, free | ((p == count + 1) & (unfinished == 0)))
        tl.store(mask_ptr + image * V + p, allowed.to(tl.int8), mask=p < V)


def position_mask(
    positions: Tensor, grain_ids: Tensor, grain: Tensor, Hc: int, Wc: int, num_grains: int, vocab_size: int
) -> Tensor:
    B, L = positions.shape
    mask = torch.empty((B, vocab_size), dtype=torch.bool, device=positions.device)
    if B:
        _position_mask_kernel[(B,)](
            positions.contiguous(), grain_ids.contiguous(), grain.contiguous(), mask.view(torch.int8), L, Hc, Wc,
            vocab_size, GRAINS=num_grains, BLOCK_P=128, BLOCK_L=32, **FUSED,
        )  # fmt: skip
    return mask
