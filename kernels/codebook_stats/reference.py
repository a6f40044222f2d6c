"""Definition of codebook statistics: for each code, how much weight fell on it and the weighted sum of its vectors."""

import torch
from torch import Tensor


def codebook_stats(x: Tensor, indices: Tensor, weights: Tensor | None, codebook_size: int) -> tuple[Tensor, Tensor]:
    """
    Args:
        x: (..., D) vectors.
        indices: (...) int64 in [0, K), or -1 for a vector that counts for no code.
        weights: (...) weight of each vector, or None for ones.
        codebook_size: K.

    Returns:
        counts (K,) and sums (K, D): float32 (float64 for float64 input).
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(-1, x.shape[-1]).double()
    weight = torch.ones(rows.shape[0], dtype=torch.float64, device=x.device)
    if weights is not None:
        weight = weights.reshape(-1).double()
    slot = torch.where(indices >= 0, indices, codebook_size).reshape(-1)
    counts = torch.zeros(codebook_size + 1, dtype=torch.float64, device=x.device).index_add_(0, slot, weight)
    sums = torch.zeros(codebook_size + 1, x.shape[-1], dtype=torch.float64, device=x.device)
    sums.index_add_(0, slot, rows * weight[:, None])
    return counts[:-1].to(accumulate), sums[:-1].to(accumulate)
