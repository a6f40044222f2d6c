"""Codes of several stages, each of what the stages before it have left."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqfast.ops.checks import check_codebook, check_float, check_mask, describe

_residual_nearest = torch.ops.vqfast.residual_nearest.default


class ResidualCodes(NamedTuple):
    """What `residual_nearest` returns.

    quantized: (..., D) the sum of the codes, dtype of x; zero where masked.
    indices: (..., Q) int64; -1 where masked.
    """

    quantized: Tensor
    indices: Tensor


def residual_nearest(x: Tensor, codebooks: Any, *, mask: Tensor | None = None) -> ResidualCodes:
    """Residual quantisation without gradient (Zeghidour et al. 2021, SoundStream, algorithm 1).

    Stage q takes the code nearest to r_q = r_{q-1} - code_{q-1}, r_1 = x, exactly as `nearest_code` does; residuals and
    their sum are rounded to the dtype of x after each stage. On the CPU a few rows at a time go through all stages, so
    that residuals never leave the cache; elsewhere each stage is a search.

    Args:
        x: (..., D) float64, float32, bfloat16 or float16, any strides.
        codebooks: (Q, K, D), dtype and device of x. One codebook for all stages: codebook.expand(Q, K, D), which is
            prepared once.
        mask: (...) bool, True where a vector counts.

    Returns:
        ResidualCodes(quantized, indices), not differentiable.

    Raises:
        TypeError: not float tensors, or of two dtypes; a mask that is not bool.
        ValueError: ranks, D, mask shape or devices that do not fit, no stage, an empty codebook.
    """
    check_float("codebooks", codebooks)
    if codebooks.ndim != 3 or codebooks.shape[0] == 0:
        raise ValueError(f"codebooks: expected shape (Q, K, D) with at least one stage, got {describe(codebooks)}")
    check_codebook(x, codebooks[0])
    if mask is not None:
        check_mask(mask, x)
    indices, quantized = _residual_nearest(x.detach(), codebooks.detach(), mask)
    return ResidualCodes(quantized, indices)
