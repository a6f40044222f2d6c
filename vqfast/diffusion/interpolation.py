"""Between two images: both noised to a level, their tokens mixed, and denoised from there."""

from typing import Any

import torch
from torch import Tensor

from vqfast.diffusion.sampler import Denoiser, sample
from vqfast.ops import Transition, q_sample


@torch.no_grad()
def interpolate(
    denoiser: Denoiser,
    first: Tensor,
    second: Tensor,
    transition: Transition,
    *,
    level: int,
    weight: float = 0.5,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """Draw images between `first` and `second`.

    Both are noised to `level`; each token is taken from the second with probability `weight`; the chain is run back
    from there (VQ-DDM, arXiv 2112.01799, released code).

    Args:
        denoiser, transition, generator: as for `vqfast.diffusion.sample`.
        first, second: (B, L) int64 codes.
        level: noise level in 1..T: low keeps what both agree on, T forgets both.
        weight: share of the second, 0..1.
        options: further arguments of `sample` (labels, steps, temperature, ...); steps are of the `level` left.

    Returns:
        (B, L) int64.

    Raises:
        TypeError, ValueError: weight or level out of range, codes that do not fit each other.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: expected a share in 0..1, got {weight!r}")
    if not isinstance(level, int) or not 1 <= level <= transition.T:
        raise ValueError(f"level: expected a noise level in 1..{transition.T}, got {level!r}")
    if first.shape != second.shape:
        raise ValueError(f"second: expected shape {tuple(first.shape)} as first has, got {tuple(second.shape)}")
    one, other = (q_sample(codes, level, transition, generator=generator) for codes in (first, second))
    source = first.device if generator is None else generator.device
    take = torch.rand(first.shape, generator=generator, device=source).to(first.device) < weight
    return sample(
        denoiser, tuple(first.shape), transition, start=torch.where(take, other, one), start_level=level,
        generator=generator, **options,
    )  # fmt: skip
