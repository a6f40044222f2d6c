"""Noise schedules: alpha_bar[t], the probability that a token is still untouched at level t of T."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _count(first: int, T: int) -> Tensor:
    """first..T, float64, on the CPU also where a model is built on the meta device."""
    if not isinstance(T, int) or isinstance(T, bool) or T < 1:
        raise ValueError(f"T: expected a whole number of noise levels, at least 1, got {T!r}")
    return torch.arange(first, T + 1, dtype=torch.float64, device="cpu")


def _levels(T: int) -> Tensor:
    """t / T for t = 0..T, float64."""
    return _count(0, T) / T


def _between(T: int, first: float, last: float) -> Tensor:
    """(T,) float64, linear in t from first at level 1 to last at level T; with T = 1 the last."""
    t = _count(1, T)
    position = (t - 1) / (T - 1) if T > 1 else t
    return first + (last - first) * position


def _squared_cosine(T: int, s: float) -> Tensor:
    """cos^2 of the angle, relative to level 0."""
    f = torch.cos((_levels(T) + s) / (1 + s) * (math.pi / 2)) ** 2
    return f / f[0]


def cosine(T: int, s: float = 0.008) -> Tensor:
    """The schedule of the VQ-DDM paper (arXiv 2112.01799): alpha_bar = f(t) / f(0), f a squared cosine.

    Args:
        T: number of noise levels, at least 1.
        s: offset that keeps the first steps from vanishing, at least 0.

    Returns:
        (T + 1,) float64, from 1 to 0.

    Raises:
        ValueError: T or s out of range.
    """
    if not s >= 0:
        raise ValueError(f"s: expected an offset of at least 0, got {s!r}")
    alpha_bar = _squared_cosine(T, s)
    alpha_bar[-1] = 0  # the cosine of pi / 2, which floating point misses
    return alpha_bar


def cosine_released(T: int) -> Tensor:
    """The schedule of VQ-DDM's released code, after Hoogeboom et al. 2021 (Multinomial Diffusion).

    The keep probability of one step is the square root of the squared cosine's ratio, clipped to [0.001, 1].
    So alpha_bar follows the cosine itself: 0.70 halfway where `cosine` has 0.49, and it ends just above 0.

    Args:
        T: number of noise levels, at least 1.

    Returns:
        (T + 1,) float64.

    Raises:
        ValueError: T out of range.
    """
    f = _squared_cosine(T, 0.008)
    alpha = (f[1:] / f[:-1]).clamp(0.001, 1.0).sqrt()
    return torch.cat([torch.ones_like(alpha[:1]), alpha.cumprod(0)])


def linear(T: int) -> Tensor:
    """alpha_bar = 1 - t / T: each step touches the same share of the tokens of an image.

    Also called "reciprocal": a token that is left is touched with probability 1 / (T - t + 1) (D3PM, Austin et al.
    2021, section 3.1; the schedule of Unleashing Transformers).

    Args:
        T: number of noise levels, at least 1.

    Returns:
        (T + 1,) float64, from 1 to 0.

    Raises:
        ValueError: T out of range.
    """
    return 1 - _levels(T)


def mask_and_replace(
    T: int,
    *,
    alpha_first: float = 0.99999,
    alpha_last: float = 9e-6,
    mask_first: float = 9e-6,
    mask_last: float = 0.99999,
) -> tuple[Tensor, Tensor]:
    """alpha_bar and mask_bar of VQ-Diffusion (Gu et al. 2022), each linear in t from level 1 to level T.

    The defaults are the end values of the released code. With them 1e-6 of the tokens are replaced at any level, so
    that the chain is practically absorbing; the paper's text has the rest of 1 - alpha_bar - mask_bar replaced.

    Args:
        T: number of noise levels, at least 1; with T = 1 the last values count.
        alpha_first, alpha_last: alpha_bar at levels 1 and T.
        mask_first, mask_last: mask_bar there.

    Returns:
        Two (T + 1,) float64, 1 and 0 at level 0. `vqfast.ops.MaskAndReplace` says which tables are a chain.

    Raises:
        ValueError: T out of range.
    """
    alpha, mask = _between(T, alpha_first, alpha_last), _between(T, mask_first, mask_last)
    return torch.cat([torch.ones_like(alpha[:1]), alpha]), torch.cat([torch.zeros_like(mask[:1]), mask])


def gaussian_betas(T: int, *, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Widths of the steps of `vqfast.ops.Gaussian`, linear in t.

    The defaults are those of D3PM (Austin et al. 2021) for 256 grey levels. In K codes a step moves next to no token
    while beta is far below 4 / (K - 1)^2: raise them for small K.

    Args:
        T: number of noise levels, at least 1; with T = 1 the last value counts.
        first, last: beta at levels 1 and T, above 0.

    Returns:
        (T,) float64.

    Raises:
        ValueError: T, first or last out of range.
    """
    if not (first > 0 and last > 0):
        raise ValueError(f"first, last: expected numbers above 0, got {first!r}, {last!r}")
    return _between(T, first, last)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "cosine": cosine,
    "cosine_released": cosine_released,
    "linear": linear,
    "reciprocal": linear,
}


def schedule(name: str, T: int) -> Tensor:
    """The schedule of that name: alpha_bar (T + 1,) float64, alpha_bar[0] = 1.

    Raises:
        ValueError: no schedule has that name, or T is out of range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    return SCHEDULES[name](T)
