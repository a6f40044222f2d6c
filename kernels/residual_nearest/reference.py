"""Definition of residual search: each stage's nearest code to what the stages before it have left of a vector."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding

from vqfast.kernels.nearest.reference import nearest as nearest_by_definition


def residual_nearest(
    x: Tensor,
    codebooks: Tensor,
    mask: Tensor | None = None,
    nearest: Callable[[Tensor, Tensor, Tensor | None], Tensor] = nearest_by_definition,
) -> tuple[Tensor, Tensor]:
    """Residual quantisation by least distance (Zeghidour et al. 2021, algorithm 1).

    Args:
        x: (..., D) vectors.
        codebooks: (Q, K, D) codes of Q stages.
        mask: (...) bool, True where a vector counts.
        nearest: the search of a stage.

    Returns:
        indices: (..., Q) int64, -1 where masked.
        quantized: (..., D) sum of the codes, 0 where masked. It and what is left are rounded to the dtype of x after
            each stage.
    """
    left, quantized, indices = x, torch.zeros_like(x, memory_format=torch.contiguous_format), []
    for codebook in codebooks:
        index = nearest(left, codebook, mask)
        code = embedding(index.clamp(min=0), codebook)
        if mask is not None:
            code = torch.where(mask[..., None], code, 0)
        left, quantized = left - code, quantized + code
        indices.append(index)
    return torch.stack(indices, -1), quantized
