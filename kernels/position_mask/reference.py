"""Definition of the mask over the next position, when codes are drawn grain by grain with their positions."""

import torch
from torch import Tensor


def position_mask(
    positions: Tensor, grain_ids: Tensor, grain: Tensor, Hc: int, Wc: int, num_grains: int, vocab_size: int
) -> Tensor:
    """Which positions may come next.

    Grain g has N_g = Hc Wc 4^g positions, then pad = N_g, eos = N_g + 1, sos = N_g + 2.

    - A position may come if it is free: neither drawn, nor in a cell that has a token of another grain.
    - eos may come when no cell has been begun without being finished; at the finest grain, when nothing is free.
    - After eos of this grain only pad may come. sos never may.

    Args:
        positions: (B, L) int64 drawn so far, of all grains, in any order; special tokens and anything out of range is
            passed over, but for eos of the grain.
        grain_ids: (B, L) int64 of each; out of range where there is nothing.
        grain: (B,) int64 of the position that comes next.
        vocab_size: V >= N_{G-1} + 3.

    Returns:
        (B, V) bool, True where allowed.
    """
    B = positions.shape[0]
    cells, device = Hc * Wc, positions.device
    grain = grain.clamp(0, num_grains - 1)[:, None]
    edge = 2**grain  # positions of this grain along a cell's edge
    count = cells * edge * edge
    id_edge = 2 ** grain_ids.clamp(0, num_grains - 1)
    real = (grain_ids >= 0) & (grain_ids < num_grains) & (positions >= 0) & (positions < cells * id_edge * id_edge)
    place = torch.where(real, positions, 0)
    cell = place // (Wc * id_edge) // id_edge * Wc + place % (Wc * id_edge) // id_edge
    own = real & (grain_ids == grain)

    def marked(size: int, index: Tensor, which: Tensor) -> Tensor:
        """(B, size): where one of those indices is."""
        out = torch.zeros(B, size + 1, dtype=torch.bool, device=device)
        return out.scatter_(1, torch.where(which, index, size), True)[:, :size]

    taken, begun = marked(cells, cell, real & ~own), marked(cells, cell, own)
    p = torch.arange(vocab_size, device=device)
    cell_of = torch.where(p < count, p // (Wc * edge) // edge * Wc + p % (Wc * edge) // edge, 0)
    free = (p < count) & ~marked(vocab_size, place, own) & ~taken.gather(1, cell_of)
    unfinished = (free & (begun.gather(1, cell_of) | (grain == num_grains - 1))).any(1, keepdim=True)
    ended = ((grain_ids == grain) & (positions == count + 1)).any(1, keepdim=True)
    return torch.where(ended, p == count, free | ((p == count + 1) & ~unfinished))
