"""Codes drawn at random, nearer ones more often."""

import torch
from torch import Tensor

# Scores that exist at once, of N x K: 4 million in float64 are 32 MB.
_ROWS, _CODES = 4096, 1024


def sample_code(
    x: Tensor,
    codebook: Tensor,
    temperature: float,
    *,
    cosine: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a code for each vector from softmax(score / temperature), the score of a code being -||x - c||.

    By the largest score / temperature + Gumbel noise, over one tile of scores after another: no N x K array is made.
    The noise is -log of an exponential variable in float64, so that a code of small probability keeps it in a large
    codebook; float32 noise from uniforms ends at 16.6.

    Args:
        x: (..., D) float; below float32 it is widened.
        codebook: (K, D), dtype and device of x.
        temperature: above 0.
        cosine: the score is <x, c> instead; the caller scales both to unit length.
        generator: of the noise, on the device of x.

    Returns:
        (...) int64. Not differentiable.
    """
    wide = torch.promote_types(x.dtype, torch.float32)  # cdist knows no half precision
    x, codebook = x.detach().to(wide), codebook.detach().to(wide)
    rows = x.reshape(-1, x.shape[-1])
    drawn = [_draw(part, codebook, temperature, cosine, generator) for part in rows.split(_ROWS)]
    return torch.cat(drawn).view(x.shape[:-1])


def _draw(
    rows: Tensor, codebook: Tensor, temperature: float, cosine: bool, generator: torch.Generator | None
) -> Tensor:
    best = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=rows.device)
    index = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for k, codes in zip(range(0, len(codebook), _CODES), codebook.split(_CODES), strict=True):
        # cdist without a product: the expanded square loses small distances far from the origin.
        score = (
            rows @ codes.T if cosine else torch.cdist(rows, codes, compute_mode="donot_use_mm_for_euclid_dist").neg_()
        )
        score = score.double() / temperature
        score -= torch.empty_like(score).exponential_(generator=generator).log_()
        value, at = score.max(dim=1)
        index = torch.where(value > best, at + k, index)
        best = torch.maximum(value, best)
    return index
