"""Definition of nearest-code search: argmin over the codebook of the squared Euclidean distance."""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code nearest to each vector, from float64 differences.

    Args:
        x: (..., D) vectors.
        codebook: (K, D) codes.

    Returns:
        (...) int64. Ties go to the lowest index; a distance that is NaN counts as infinite, so a NaN row gets 0 and
        a NaN code loses to any finite one.
    """
    rows = x.reshape(-1, x.shape[-1])
    codes = codebook.double()
    out = torch.empty(rows.shape[0], dtype=torch.int64, device=x.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, codes.numel()))
    for start in range(0, rows.shape[0], step):
        difference = rows[start : start + step, None].double() - codes
        distance = difference.square().sum(-1)
        out[start : start + step] = distance.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(-1)
    return out.reshape(x.shape[:-1])
