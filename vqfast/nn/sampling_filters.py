"""From logits to a drawn symbol: guidance, temperature, top-k, nucleus."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DrawOptions:
    """How symbols are drawn from logits.

    temperature: divides the logits, before the filters; above 0. top_k, top_p: see `filter_logits`.
    prefix: of these names in what errors say.

    Raises:
        ValueError: out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    prefix: str = ""

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"{self.prefix}temperature: expected a number above 0, got {self.temperature!r}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"{self.prefix}top_k: expected a whole number of at least 1, or None, got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"{self.prefix}top_p: expected a share in (0, 1], or None, got {self.top_p!r}")


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): unconditional + scale * (conditional - unconditional).

    Args:
        logits: (2 B, V), the conditional ones first; with scale 1 (B, V), which come back as they are.
    """
    if scale == 1.0:
        return logits
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits with -inf where a symbol may not be drawn.

    Args:
        logits: (..., V).
        top_k: keep the k likeliest symbols, and those that tie with the last of them.
        top_p: of these keep the fewest whose probabilities sum to at least p (Holtzman et al. 2020), and those that
            tie with the last of them.
    """
    V = logits.shape[-1]
    if top_k is not None and top_k < V:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ranked = logits.sort(dim=-1, descending=True).values
        p = ranked.softmax(dim=-1)
        kept = (p.cumsum(dim=-1) - p < top_p).sum(dim=-1, keepdim=True)  # those before it do not reach p
        logits = logits.masked_fill(logits < ranked.gather(-1, kept - 1), -torch.inf)
    return logits


def draw(logits: Tensor, options: DrawOptions, generator: torch.Generator | None = None) -> Tensor:
    """One symbol for each row of logits.

    Args:
        logits: (B, V), at least one finite in each row; -inf is never drawn.
        generator: source of the random numbers.

    Returns:
        (B,) int64.
    """
    scaled = logits.float() / options.temperature
    p = filter_logits(scaled, options.top_k, options.top_p).softmax(dim=-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]
