"""A regulariser that keeps codes apart."""

import torch
import torch.nn.functional as F
from torch import Tensor


def orthogonal_loss(codebook: Tensor, active: Tensor | None = None, max_codes: int | None = None) -> Tensor:
    """Mean squared cosine between codes, less that of a code with itself (Shin et al. 2021, eq. 2).

    sum_ij cos_ij^2 / n^2 - 1 / n over n codes. The sum is the squared Frobenius norm of C C^T, which is that of the
    D x D matrix C^T C: no K x K array is made.

    Args:
        codebook: (K, D), or (H, K, D): mean over H.
        active: (K,) or (H, K) bool, which codes the loss is over; None for all.
        max_codes: the loss is over so many of these, drawn at random.

    Returns:
        Scalar.
    """
    units = F.normalize(codebook, dim=-1, eps=1e-6)
    taken = torch.ones_like(units[..., 0]) if active is None else active.to(units.dtype)
    if max_codes is not None and max_codes < codebook.shape[-2]:
        order = torch.where(taken > 0, torch.rand_like(taken), 2.0).argsort(dim=-1)
        among = torch.zeros_like(taken).scatter_(-1, order[..., :max_codes], 1.0)
        taken = taken * among
    count = taken.sum(-1).clamp(min=1)
    units = units * taken[..., None]
    squares = (units.transpose(-1, -2) @ units).square().sum((-1, -2))
    return (squares / count.square() - 1 / count).mean()
