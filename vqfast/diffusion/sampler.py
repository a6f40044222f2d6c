"""The reverse process: from uniform noise, or from the known part of an image, to codes."""

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

from vqfast.ops import Uniform, p_sample, q_sample

# denoiser(x_t (B, L) int64, t (B,) int64, labels (B,) int64 or None) -> logits of x_0 (B, L, K)
Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]

NO_CLASS = -1  # the label of an unconditional prediction


def sample_steps(T: int, n: int | None = None) -> list[int]:
    """Noise levels that a sampler visits: n steps, evenly spaced, from T down to 0.

    Args:
        T: number of noise levels.
        n: number of steps in 1..T; None takes all T.

    Returns:
        n + 1 levels, strictly decreasing, the first T and the last 0.

    Raises:
        ValueError: n is not a whole number in 1..T.
    """
    n = T if n is None else n
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= T:
        raise ValueError(f"steps: expected a whole number in 1..{T} (T = {T}), got {n!r}")
    return [T * (n - i) // n for i in range(n + 1)]


def _guided(denoiser: Denoiser, x_t: Tensor, t: Tensor, labels: Tensor | None, scale: float) -> Tensor:
    """Classifier-free guidance: log-probabilities unconditional + scale * (conditional - unconditional)."""
    if scale == 1.0:
        return denoiser(x_t, t, labels)
    both = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
    conditional, unconditional = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    # Logits do for log-probabilities: the two normalisers are constants of a token, which the softmax drops.
    return torch.lerp(unconditional, conditional, scale)


def _show_progress(pairs: list[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    from tqdm.auto import tqdm  # of the `train` extra: a library call must not need it

    return tqdm(pairs, desc="sampling", unit="step", leave=False)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    shape: tuple[int, int],
    transition: Uniform,
    *,
    labels: Tensor | None = None,
    steps: int | None = None,
    temperature: float = 1.0,
    guidance_scale: float = 1.0,
    known: Tensor | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw codes from the model.

    A step from level t to level s < t is the exact posterior of the composite chain, so fewer steps cost
    quality only through the denoiser. With `known` the given tokens are re-noised to level s at every step
    and end as they were given (RePaint, Lugmayr et al. 2022, without its resampling, on a discrete chain).

    Args:
        denoiser: maps (x_t (B, L) int64, t (B,) int64, labels) to logits of x_0, (B, L, K).
        shape: (B, L).
        transition: the forward chain that the denoiser was trained with.
        labels: (B,) int64 classes, -1 for none.
        steps: number of denoiser calls, 1..T, evenly spaced; None takes all T.
        temperature: divides the logits; above 0.
        guidance_scale: 1 is the conditional model, 0 the unconditional, more than 1 exaggerates the class (Ho
            and Salimans 2022). Any other than 1 doubles the denoiser's batch.
        known: (B, L) int64, a clean code where one is given, -1 elsewhere.
        device: where to draw; default that of `known` or `labels`, else the CPU.
        generator: source of the random numbers.
        progress: show a bar.

    Returns:
        (B, L) int64.

    Raises:
        TypeError, ValueError: guidance without labels, steps not in 1..T, arguments that do not fit `shape`.
    """
    B, L = shape
    if labels is not None and labels.shape != (B,):
        raise ValueError(f"labels: expected shape (B,) = ({B},), got {tuple(labels.shape)}")
    if known is not None and known.shape != (B, L):
        raise ValueError(f"known: expected shape (B, L) = ({B}, {L}), got {tuple(known.shape)}")
    if guidance_scale != 1.0 and labels is None:
        raise ValueError(f"labels: guidance_scale = {guidance_scale} needs labels, got None")
    if device is None:
        device = next((given.device for given in (known, labels) if given is not None), torch.device("cpu"))
    pairs = list(pairwise(sample_steps(transition.T, steps)))

    source = device if generator is None else generator.device
    x = torch.randint(transition.codebook_size, (B, L), generator=generator, device=source).to(device)
    if known is not None:
        noised = q_sample(known.clamp(min=0), transition.T, transition, generator=generator)
        x = torch.where(known >= 0, noised, x)
    for t, s in _show_progress(pairs) if progress else pairs:
        level = torch.full((B,), t, dtype=torch.int64, device=x.device)
        logits = _guided(denoiser, x, level, labels, guidance_scale)
        x = p_sample(logits, x, t, s, transition, temperature=temperature, known=known, generator=generator)
    return x
