"""Definition of packing: the codes of images whose cells have different grains, as one sequence an image."""

import torch
import torch.nn.functional as F
from torch import Tensor


def on_fine_grid(cells: Tensor, factor: int) -> Tensor:
    """(B, Hc, Wc) values of cells, repeated on the fine grid: (B, Hc * factor, Wc * factor)."""
    return cells.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def cell_layout(grains: Tensor, num_grains: int, region: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where the codes of each cell lie in its image's sequence: code (i, j) of a cell is token start + i * pitch + j.

    Args:
        grains: (B, Hc, Wc) int64 in [0, num_grains).
        region: the 4^g codes of a cell one after the other; else row by row over the whole grid of their grain.

    Returns:
        start and pitch (B, Hc, Wc), lengths (B,): tokens of each image. int64.
    """
    start, pitch = torch.zeros_like(grains), torch.zeros_like(grains)
    offset = grains.new_zeros(len(grains), 1, 1)
    for g in range(num_grains):
        member = (grains == g).long()
        in_row = member.sum(-1, keepdim=True)
        above = in_row.cumsum(1) - in_row
        before = member.cumsum(-1) - member
        if region:
            first, step = (above + before) * 4**g, torch.full_like(in_row, 2**g)
        else:
            first, step = above * 4**g + before * 2**g, in_row * 2**g
        start += member * (offset + first)
        pitch += member * step
        offset = offset + in_row.sum(1, keepdim=True) * 4**g
    return start, pitch, offset.reshape(-1)


def pack(values: Tensor, grains: Tensor, region: bool, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Args:
        values: (B, Hf, Wf) or (B, Hf, Wf, D), any dtype, on the fine grid; the value of a coarser code is the one at
            the top left of what it covers.
        grains: (B, Hc, Wc) int64, 0 the coarsest; Hf / Hc = Wf / Wc = 2^(G-1) gives the number of grains G. What is
            out of range is brought into it.
        region: codes cell by cell within a grain; else row by row.
        capacity: number of tokens T of the result. Tokens beyond it are dropped.

    Returns:
        values (T,) or (T, D), zero in the unused tail; cu_seqlens (B + 1,) int32, at most T; positions (T,) int64,
        raster index on the grid of the token's grain, and grain_ids (T,) int64, -1 in the tail.
    """
    Hf, Wf, Hc = *values.shape[1:3], grains.shape[1]
    factor = Hf // Hc
    grains = grains.clamp(0, factor.bit_length() - 1)
    start, pitch, lengths = cell_layout(grains, factor.bit_length(), region)
    ends = lengths.cumsum(0)

    # Each position of the fine grid: the edge of the square that its code covers, and where in its cell that code is.
    edge = factor // 2 ** on_fine_grid(grains, factor)
    y, x = torch.arange(Hf, device=grains.device)[:, None], torch.arange(Wf, device=grains.device)
    token = on_fine_grid(start + (ends - lengths)[:, None, None], factor)
    token = token + (y % factor) // edge * on_fine_grid(pitch, factor) + (x % factor) // edge
    kept = (y % edge == 0) & (x % edge == 0) & (token < capacity)
    # One slot more than there are tokens takes the rest: no boolean index, so no host sync.
    token = torch.where(kept, token, capacity).reshape(-1)

    def placed(source: Tensor, fill: int) -> Tensor:
        out = source.new_full((capacity + 1, *source.shape[3:]), fill)
        out[token] = source.flatten(0, 2)
        return out[:capacity]

    position = (y // edge) * (Wf // edge) + x // edge
    cu_seqlens = F.pad(ends, (1, 0)).clamp(max=capacity).int()
    return placed(values, 0), cu_seqlens, placed(position, -1), placed(on_fine_grid(grains, factor), -1)
