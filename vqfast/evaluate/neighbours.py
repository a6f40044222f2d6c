"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991): sets of images as unions of balls."""

from collections.abc import Iterator

import torch
from torch import Tensor

_DISTANCES = 1 << 25  # at once


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of the generated images that lie among the real ones, and of the real that lie among the generated.

    An image lies among others if it is no further from one of them than that is from its k-th nearest neighbour.

    Args:
        real, generated: (N, D) and (M, D) float features.
        k: neighbours; the paper's is 3.

    Returns:
        Precision and recall, 0..1.

    Raises:
        ValueError: other shapes, or not more than k images of each kind.
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"real, generated: expected features (N, D) and (M, D), got {tuple(real.shape)} and "
            f"{tuple(generated.shape)}"
        )
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(
            f"k: expected at least 1 and fewer neighbours than images, {len(real)} real and {len(generated)} "
            f"generated, got {k}"
        )
    centre = real.double().mean(0)  # distances stay, cancellation goes
    real, generated = real.double() - centre, generated.double() - centre
    return _covered(generated, real, k), _covered(real, generated, k)


def _covered(points: Tensor, others: Tensor, k: int) -> float:
    """Share of `points` within the ball of one of `others`, whose radius is the distance to its k-th neighbour."""
    # The nearest of a point among its own set is the point itself.
    radii = torch.cat([part.topk(k + 1, largest=False).values[:, -1] for part in _distances(others, others)])
    inside = torch.cat([(part <= radii).any(1) for part in _distances(points, others)])
    return inside.double().mean().item()


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Distances of some rows of x at a time to all of y."""
    for part in x.split(max(_DISTANCES // len(y), 1)):
        yield torch.cdist(part, y)
