"""Decoding by confidence: absorbing diffusion that reveals first what it is surest of."""

import math

import torch
from torch import Tensor

from vqfast.diffusion.sampler import Denoiser, check_request, chunks, predict, with_progress
from vqfast.kernels.p_sample.reference import guided
from vqfast.ops import Absorbing, p_sample


def masked_share(step: int, steps: int) -> float:
    """Share of the tokens still masked after `step` of `steps` steps: a quarter of a cosine, from 1 to 0."""
    return max(math.cos(math.pi / 2 * step / steps), 0.0) if step < steps else 0.0


def gumbel(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    source = device if generator is None else generator.device
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=source).to(device)
    # 1 - u is never 0, and its logarithm is right where u is near 0.
    return -torch.log((-torch.log1p(-uniform)).clamp(min=1e-300))


@torch.no_grad()
def sample_by_confidence(
    denoiser: Denoiser,
    shape: tuple[int, int],
    transition: Absorbing,
    *,
    labels: Tensor | None = None,
    steps: int = 8,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float = 1.0,
    choice_temperature: float = 4.5,
    known: Tensor | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw codes in a few steps: each draws every masked token and keeps those of the highest confidence.

    MaskGIT (Chang et al. 2022): after step i of n, cos(pi i / 2 n) of the unknown tokens are masked again. Confidence
    is log p of the drawn code plus Gumbel noise times choice_temperature, which falls to 0 with the steps. This is no
    sampler of the chain's distribution: it trades likelihood for fewer steps.

    Args:
        denoiser, shape, labels, temperature, top_k, top_p, guidance_scale, known, batch_size, device, generator,
            progress: as for `vqfast.diffusion.sample`.
        transition: absorbing; the denoiser is told the level that masks as many tokens as there are.
        steps: number of denoiser calls, at least 1.
        choice_temperature: at least 0; 0 always keeps the surest.

    Returns:
        (B, L) int64.

    Raises:
        TypeError: another family. ValueError: steps or choice_temperature out of range, and as for `sample`.
    """
    B, L = shape
    if not isinstance(transition, Absorbing):
        raise TypeError(f"transition: expected vqfast.ops.Absorbing, got {transition!r}")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps: expected a whole number, at least 1, got {steps!r}")
    if not choice_temperature >= 0:
        raise ValueError(f"choice_temperature: expected at least 0, got {choice_temperature!r}")
    check_request(shape, labels, known, guidance_scale, batch_size)
    if device is None:
        device = next((given.device for given in (known, labels) if given is not None), torch.device("cpu"))

    def draw(rows: slice) -> Tensor:
        here_labels, here_known = (None if v is None else v[rows] for v in (labels, known))
        mask = transition.codebook_size
        x = torch.full((rows.stop - rows.start, L), mask, dtype=torch.int64, device=device)
        if here_known is not None:
            x = torch.where(here_known >= 0, here_known, x)
        unknown = (x == mask).sum(1)  # (B,)
        mask_bar = transition.levels_on(x.device)[:, 1].contiguous()
        for i in with_progress(list(range(steps)), progress):
            masked = x == mask
            level = torch.searchsorted(mask_bar, masked.double().mean(1)).clamp(1, transition.T)
            logits = guided(*predict(denoiser, x, level, here_labels, guidance_scale), guidance_scale)
            drawn = p_sample(
                logits, x, level, 0, transition, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            log_p = (logits.float() / temperature).log_softmax(-1).gather(-1, drawn[..., None])[..., 0].double()
            noise = gumbel(x.shape, x.device, generator)
            confidence = log_p + choice_temperature * (1 - (i + 1) / steps) * noise
            # What is known is surer than anything.
            confidence = confidence.where(masked, torch.inf)
            again = (unknown * masked_share(i + 1, steps)).long()
            rank = confidence.argsort(dim=1, stable=True).argsort(dim=1)
            x = torch.where(rank < again[:, None], mask, drawn)
        return x

    return torch.cat([draw(rows) for rows in chunks(B, batch_size)]) if B else draw(slice(0, 0))
