"""A claim that one thing is better than another, and whether the figures bear it out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Claim:
    """A comparison, by figures of both on the same images.

    text: what is claimed.
    difference: by how much the first is better, in the figure's unit; above 0 supports the claim.
    deviation: standard error of that difference.
    wins: share of the images, or of the resamples of a bootstrap, on which the first is better.
    """

    text: str
    difference: float
    deviation: float
    wins: float

    @property
    def verdict(self) -> str:
        """Holds or fails where the difference is at least two standard errors from 0."""
        if abs(self.difference) < 2 * self.deviation:
            return "undecided"
        return "holds" if self.difference > 0 else "fails"

    def figures(self, of: str) -> str:
        """In words; `of`: what `wins` is a share of."""
        return f"difference {self.difference:.3g} +- {self.deviation:.2g}, better on {self.wins:.0%} of the {of}"


def table(claims: Sequence[Claim], of: str) -> list[str]:
    """Lines of a Markdown table; `of`: see Claim.figures."""
    rows = [f"| {claim.text} | {claim.verdict} | {claim.figures(of)} |" for claim in claims]
    return ["| claim | verdict | figures |", "|---|---|---|", *rows]


def bootstrap(
    text: str, difference: Callable[[Tensor, Tensor], Tensor], trainings: int, images: int, resamples: int, seed: int
) -> Claim:
    """Judge a claim by resampling the trainings, and the images of each, with replacement (Efron 1979).

    Args:
        text: what is claimed.
        difference: by how much the first is better, a scalar: given which of the trainings (S,) and which of the images
            (N,) to take, int64.
        trainings, images: S and N. Few trainings tell little of how much another would differ.
        resamples: how many.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    resampled = torch.stack(
        [
            difference(
                torch.randint(trainings, (trainings,), generator=generator),
                torch.randint(images, (images,), generator=generator),
            ).double()
            for _ in range(resamples)
        ]
    )
    found = difference(torch.arange(trainings), torch.arange(images))
    return Claim(text, float(found), float(resampled.std()), float((resampled > 0).double().mean()))


def bootstrap_of_mean(text: str, differences: Tensor, resamples: int, seed: int) -> Claim:
    """`bootstrap` of a mean: differences (S, N), by how much the first is better in each image of each training."""
    return bootstrap(text, lambda s, i: differences[s][:, i].mean(), *differences.shape, resamples, seed)
