"""The reverse process: from noise, from the known part of an image, or from a noised one, to codes."""

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

from vqfast.diffusion.graph import GraphedStep
from vqfast.ops import Transition, p_sample, q_sample

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


def predict(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, labels: Tensor | None, guidance_scale: float
) -> tuple[Tensor, Tensor | None]:
    """Logits with the labels and, for classifier-free guidance, logits without: one call of twice the batch."""
    if guidance_scale == 1.0:
        return denoiser(x_t, t, labels), None
    both = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
    conditional, unconditional = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return conditional, unconditional


def check_request(
    shape: tuple[int, int], labels: Tensor | None, known: Tensor | None, guidance_scale: float, batch_size: int | None
) -> None:
    """Raise unless what a sampler is given fits (B, L)."""
    B, L = shape
    if labels is not None and labels.shape != (B,):
        raise ValueError(f"labels: expected shape (B,) = ({B},), got {tuple(labels.shape)}")
    if known is not None and known.shape != (B, L):
        raise ValueError(f"known: expected shape (B, L) = ({B}, {L}), got {tuple(known.shape)}")
    if guidance_scale != 1.0 and labels is None:
        raise ValueError(f"labels: guidance_scale = {guidance_scale} needs labels, got None")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size!r}")


def chunks(n: int, batch_size: int | None) -> list[slice]:
    """The rows 0..n-1, batch_size at a time."""
    size = batch_size or max(n, 1)
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def with_progress(steps: list, show: bool) -> Iterable:
    """The steps, behind a bar if asked for."""
    if not show:
        return steps
    from tqdm.auto import tqdm  # of the `train` extra: a library call must not need it

    return tqdm(steps, desc="sampling", unit="step", leave=False)


def draw_prior(
    shape: tuple[int, int],
    transition: Transition,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """x_T (B, L) int64 of `transition.prior()`: uniform noise, all mask, or what lies between."""
    source = torch.device(device) if generator is None else generator.device
    if transition.mask_id is None and transition.noise is None:
        return torch.randint(transition.codebook_size, shape, generator=generator, device=source).to(device)
    quantile = torch.rand(shape, generator=generator, dtype=torch.float64, device=source).to(device)
    cumulative = transition.prior().to(device).cumsum(0)
    return torch.searchsorted(cumulative, quantile, right=True).clamp(max=transition.states - 1)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    shape: tuple[int, int],
    transition: Transition,
    *,
    labels: Tensor | None = None,
    steps: int | None = None,
    rule: str = "joint",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float = 1.0,
    known: Tensor | None = None,
    start: Tensor | None = None,
    start_level: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    cuda_graph: bool = False,
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
        steps: number of denoiser calls, 1..start_level, evenly spaced; None takes every level.
        rule: "joint" or "marginal", the one that the denoiser was trained with.
        temperature: divides the logits; above 0.
        top_k, top_p: draw among the most likely codes only, see vqfast.ops.p_sample.
        guidance_scale: 1 is the conditional model, 0 the unconditional, more than 1 exaggerates the class (Ho
            and Salimans 2022). Any other than 1 doubles the denoiser's batch.
        known: (B, L) int64, a clean code where one is given, -1 elsewhere.
        start: (B, L) int64, x at level start_level to go on from; default a draw of the chain's prior at T.
        start_level: level of `start`, 1..T; default T.
        batch_size: samples at a time; None takes all B at once.
        device: where to draw; default that of `known`, `labels` or `start`, else the CPU.
        generator: source of the random numbers.
        progress: show a bar.
        cuda_graph: capture a step and replay it (CUDA only; the denoiser must be capturable).

    Returns:
        (B, L) int64.

    Raises:
        TypeError, ValueError: guidance without labels, steps or start_level out of range, arguments that do not fit
            `shape`.
    """
    B, L = shape
    check_request(shape, labels, known, guidance_scale, batch_size)
    if start is not None and start.shape != (B, L):
        raise ValueError(f"start: expected shape (B, L) = ({B}, {L}), got {tuple(start.shape)}")
    T = transition.T if start_level is None else start_level
    if not 1 <= T <= transition.T:
        raise ValueError(f"start_level: expected a level in 1..{transition.T}, got {start_level!r}")
    if T < transition.T and start is None:
        raise ValueError(f"start: missing; start_level = {T} needs codes at that level to start from")
    pairs = list(pairwise(sample_steps(T, steps)))
    if device is None:
        device = next((given.device for given in (known, labels, start) if given is not None), torch.device("cpu"))
    if cuda_graph and torch.device(device).type != "cuda":
        raise ValueError(f"cuda_graph: expected a CUDA device, got {device}")

    def draw(rows: slice) -> Tensor:
        here_labels, here_known = (None if v is None else v[rows] for v in (labels, known))
        if start is None:
            x = draw_prior((rows.stop - rows.start, L), transition, device=device, generator=generator)
        else:
            x = start[rows].to(device)
        if here_known is not None:
            noised = q_sample(here_known.clamp(min=0), T, transition, generator=generator)
            x = torch.where(here_known >= 0, noised, x)

        def step(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            logits, unconditional = predict(denoiser, x, t, here_labels, guidance_scale)
            return p_sample(
                logits, x, t, s, transition, rule=rule, temperature=temperature, top_k=top_k, top_p=top_p,
                guidance=None if unconditional is None else guidance_scale, unconditional=unconditional,
                known=here_known, generator=generator,
            )  # fmt: skip

        run = GraphedStep(step, x, generator) if cuda_graph else step
        level = lambda value: torch.full((x.shape[0],), value, dtype=torch.int64, device=x.device)
        for t, s in with_progress(pairs, progress):
            x = run(x, level(t), level(s))
        return x

    return torch.cat([draw(rows) for rows in chunks(B, batch_size)]) if B else draw(slice(0, 0))
