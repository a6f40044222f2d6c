"""Definition of unpacking: packed codes on the fine grid, each repeated over the square that it covers."""

import torch
from torch import Tensor

from vqfast.kernels.pack.reference import on_fine_grid


def token_slots(
    cu_seqlens: Tensor, positions: Tensor, grain_ids: Tensor, grains: Tensor, num_grains: int
) -> tuple[Tensor, Tensor]:
    """The fine position at the top left of each token's square, and the token at each such position.

    A token counts where its image's grain map has its grain. Of two at one place the later counts.

    Returns:
        place (T,) int64 in [0, B * Hf * Wf], the last for tokens that do not count; slots (B * Hf * Wf + 1,) int64, -1
        where there is no token.
    """
    (B, Hc, Wc), T, factor = grains.shape, positions.shape[0], 2 ** (num_grains - 1)
    Hf, Wf = Hc * factor, Wc * factor
    cells = B * Hf * Wf
    token = torch.arange(T, device=positions.device)
    image = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
    edge = factor // 2 ** grain_ids.clamp(0, num_grains - 1)
    width = Wf // edge
    y, x = positions.clamp(min=0) // width * edge, positions.clamp(min=0) % width * edge
    counts = (image < B) & (token >= cu_seqlens[0]) & (grain_ids >= 0) & (grain_ids < num_grains)
    counts = counts & (positions >= 0) & (y < Hf)
    cell = (image * Hc + y // factor) * Wc + x // factor
    map_value = torch.cat([grains.reshape(-1), grains.new_full((1,), -1)])
    counts = counts & (map_value[torch.where(counts, cell, B * Hc * Wc)] == grain_ids)
    place = torch.where(counts, (image * Hf + y) * Wf + x, cells)
    slots = torch.full((cells + 1,), -1, dtype=torch.int64, device=positions.device)
    slots.scatter_reduce_(0, place, token, "amax")
    slots[cells] = -1
    return place, slots


def unpack(
    values: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    grain_ids: Tensor,
    grains: Tensor,
    num_grains: int,
    replicate: bool,
) -> Tensor:
    """
    Args:
        values: (T,) or (T, D), any dtype.
        cu_seqlens: (B + 1,) int32, the tokens of image b are cu_seqlens[b] to cu_seqlens[b + 1] - 1, in any order.
        positions, grain_ids: (T,) int64; tokens with one out of range, or of a grain that the map does not have at
            their place, are left out. Of two at one place the later counts.
        grains: (B, Hc, Wc) int64.
        num_grains: G.
        replicate: whether a code is repeated over the square that it covers; else it stands at its top left only.

    Returns:
        (B, Hf, Wf) or (B, Hf, Wf, D), Hf = 2^(G-1) Hc; zero where there is no token.
    """
    (B, Hc, Wc), factor = grains.shape, 2 ** (num_grains - 1)
    Hf, Wf = Hc * factor, Wc * factor
    _, slots = token_slots(cu_seqlens, positions, grain_ids, grains, num_grains)
    edge = factor // 2 ** on_fine_grid(grains, factor).clamp(0, num_grains - 1)
    y, x = torch.arange(Hf, device=grains.device)[:, None], torch.arange(Wf, device=grains.device)
    image = torch.arange(B, device=grains.device)[:, None, None]
    slot = slots[(image * Hf + y // edge * edge) * Wf + x // edge * edge]
    if not replicate:
        slot = torch.where((y % edge == 0) & (x % edge == 0), slot, -1)
    # A row of zeros before the first stands for 'no token'.
    return torch.cat([values.new_zeros((1, *values.shape[1:])), values])[slot + 1]


def unpack_backward(
    grad: Tensor, cu_seqlens: Tensor, positions: Tensor, grain_ids: Tensor, grains: Tensor, num_grains: int
) -> Tensor:
    """Gradient of a replicating `unpack` to its values: the sum over the square that each token covers.

    Args:
        grad: (B, Hf, Wf) or (B, Hf, Wf, D), float.

    Returns:
        (T,) or (T, D) in the dtype of grad; zero for tokens that do not count.
    """
    B, Hf, Wf = grad.shape[:3]
    factor, T, D = 2 ** (num_grains - 1), positions.shape[0], grad.shape[3:].numel()
    place, slots = token_slots(cu_seqlens, positions, grain_ids, grains, num_grains)
    counts = slots[place] == torch.arange(T, device=place.device)
    wide = grad.reshape(B, Hf, Wf, D).to(torch.promote_types(grad.dtype, torch.float32))
    out = wide.new_zeros(T, D)
    for g in range(num_grains):
        edge = factor // 2**g
        sums = wide.reshape(B, Hf // edge, edge, Wf // edge, edge, D).sum((2, 4))
        member = counts & (grain_ids == g)
        # The place of a token of this grain, on the grid of the grain; of any other, the row of zeros at the end.
        row, x = place // Wf, place % Wf
        index = torch.where(member, row // edge * (Wf // edge) + x // edge, B * (Hf // edge) * (Wf // edge))
        rows = torch.cat([sums.flatten(0, 2), sums.new_zeros(1, D)])
        out = out + rows[index]
    return out.reshape(T, *grad.shape[3:]).to(grad.dtype)
