"""Routers: how many codes each region of an image gets (DQ-VAE, Huang et al. 2023, arXiv 2305.11718).

A router looks at an image cell by cell of the coarsest code grid and gives each cell a grain: 0 for one code, g for 4^g
codes. Features come coarsest first, each grid twice as fine as the one before.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.nn.blocks import GROUPS, group_norm
from vqfast.nn.codebook import sum_over_processes
from vqfast.ops import grain_entropy

_LARGEST_ENTROPY = math.log(32)  # of the 32 bins of the grey-level histogram
_HISTOGRAM = 4096  # bins of the running distribution of entropies: quantiles to within 0.001


class Routing(NamedTuple):
    """What a router decides.

    grains: (B, Hc, Wc) int64, 0 the coarsest.
    gate: (B, grains, Hc, Wc), one-hot at the grain chosen, with the straight-through gradient to the router; None where
        the router learns nothing.
    scores: (B, Hc, Wc) float: the higher, the sooner a cell gets more codes when their number is prescribed.
    """

    grains: Tensor
    gate: Tensor | None
    scores: Tensor


class FeatureRouter(nn.Module):
    """Grains from the features: each is normalised and averaged to the coarsest grid, an MLP gives a logit per grain.

    In training mode grains are drawn by adding Gumbel noise to the logits, and the gate carries the gradient of their
    softmax (straight-through Gumbel-softmax, Jang et al. 2017, temperature 1); in eval mode the largest logit wins.

    Args:
        channels: C of each feature; a multiple of `groups`.
        grains: number of grains, and of features.
        layers: 2 for linear, SiLU, linear; 1 for a single linear layer (the paper's ablation).
        groups: of each normalisation.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, channels: int, grains: int = 2, layers: int = 2, groups: int = GROUPS):
        super().__init__()
        _check_grains(grains)
        if layers not in (1, 2):
            raise ValueError(f"layers: expected 1 or 2, got {layers}")
        self.grains = grains
        width = channels * grains
        self.norms = nn.ModuleList(group_norm(channels, groups) for _ in range(grains))
        hidden: list[nn.Module] = [nn.Linear(width, width), nn.SiLU()] if layers == 2 else []
        self.gate = nn.Sequential(*hidden, nn.Linear(width, grains))

    def logits(self, features: Sequence[Tensor]) -> Tensor:
        """Features (B, C, Hc * 2^g, Wc * 2^g), g = 0, 1, ..., to logits (B, Hc, Wc, grains)."""
        pooled = [
            F.avg_pool2d(norm(h), 2**grain) for grain, (norm, h) in enumerate(zip(self.norms, features, strict=True))
        ]
        return self.gate(torch.cat(pooled, dim=1).permute(0, 2, 3, 1))

    def decide(self, features: Sequence[Tensor], images: Tensor | None = None) -> Routing:
        """The likeliest grains, without noise or gradient. images is not read."""
        logits = self.logits(features)
        return Routing(logits.argmax(-1), None, _expected_grain(logits))

    def forward(self, features: Sequence[Tensor], images: Tensor | None = None, noise: Tensor | None = None) -> Routing:
        """Route, in training mode with noise.

        Args:
            features: grains of (B, C, Hc * 2^g, Wc * 2^g).
            images: not read.
            noise: (B, Hc, Wc, grains) to add to the logits in place of fresh Gumbel noise.
        """
        if not self.training:
            return self.decide(features)
        logits = self.logits(features)
        gate = straight_through_gate(logits, noise)
        return Routing(gate.argmax(1), gate, _expected_grain(logits))


class EntropyRouter(nn.Module):
    """Grains from the image itself: the cells whose grey levels are the most varied get the most codes.

    A cell's entropy (`vqfast.ops.grain_entropy`) is compared with quantiles, so that each grain gets its share of the
    cells. per="dataset": quantiles of the training images of all steps before, by a histogram that training fills; an
    image may get more codes than another. Until it has seen an image, and with per="image": quantiles of the image
    itself, so that every image gets the same number of codes.

    The released code reads its thresholds from a table, made for another histogram than its network computes: they do
    not give the shares they are named after. `thresholds` prescribes such values all the same.

    Args:
        patch_size: pixels a side of a cell.
        shares: share of the cells that each finer grain gets, (median, ..., fine); the coarsest gets the rest.
        per: "dataset" or "image".
        thresholds: entropies above which a cell has grain 1, 2, ...; fixed, in place of quantiles.

    Buffer: histogram (bins,) int64, how many training cells had which entropy, 0..ln(32).

    Raises:
        ValueError: shares that are negative or exceed 1, an unknown `per`, thresholds that do not rise.
    """

    def __init__(
        self,
        patch_size: int,
        shares: Sequence[float] = (0.5,),
        per: str = "dataset",
        thresholds: Sequence[float] | None = None,
    ):
        super().__init__()
        self.shares = check_shares(shares)
        self.grains = len(self.shares) + 1
        if patch_size < 1:
            raise ValueError(f"patch_size: expected at least 1, got {patch_size}")
        if per not in ("dataset", "image"):
            raise ValueError(f"per: expected 'dataset' or 'image', got {per!r}")
        if thresholds is not None and (len(thresholds) != len(self.shares) or list(thresholds) != sorted(thresholds)):
            raise ValueError(f"thresholds: expected {len(self.shares)} rising entropies, got {tuple(thresholds)}")
        self.patch_size, self.per = patch_size, per
        self.fixed_thresholds = None if thresholds is None else tuple(float(t) for t in thresholds)
        self.register_buffer("histogram", torch.zeros(_HISTOGRAM, dtype=torch.int64))
        self.accumulating = False
        self._noted: Tensor | None = None

    def entropy(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to entropies (B, Hc, Wc), nats."""
        return grain_entropy(images, self.patch_size)

    @torch.no_grad()
    def observe(self, entropy: Tensor) -> None:
        """Add the entropies of training images to the running distribution; no sync.

        Inside `accumulate_entropies` they are kept until its end.
        """
        place = (entropy.reshape(-1) / _LARGEST_ENTROPY * _HISTOGRAM).long().clamp(0, _HISTOGRAM - 1)
        counts = torch.zeros_like(self.histogram).scatter_add_(0, place, torch.ones_like(place))
        self._noted = counts if self._noted is None else self._noted + counts
        if not self.accumulating:
            self.update_histogram()

    @torch.no_grad()
    def update_histogram(self) -> None:
        """Take in all that was observed since the last time, if anything; with several processes one all-reduce."""
        if self._noted is not None:
            noted, self._noted = self._noted, None
            self.histogram += sum_over_processes(noted)

    @property
    def thresholds(self) -> Tensor:
        """(grains - 1,) entropies above which a cell has grain 1, 2, ...: float64, on the device."""
        if self.fixed_thresholds is not None:
            return torch.tensor(self.fixed_thresholds, dtype=torch.float64, device=self.histogram.device)
        below = self.histogram.cumsum(0).double() / self.histogram.sum().clamp(min=1)
        wanted = below.new_tensor(_shares_below(self.shares))
        place = torch.searchsorted(below, wanted).clamp(max=_HISTOGRAM - 1)
        before = torch.where(place > 0, below[(place - 1).clamp(min=0)], 0)
        # Within its bin the distribution is taken as even.
        inside = ((wanted - before) / (below[place] - before).clamp(min=1e-12)).clamp(0, 1)
        return (place + inside) / _HISTOGRAM * _LARGEST_ENTROPY

    def decide(self, features: Sequence[Tensor] | None, images: Tensor) -> Routing:
        """Route images (B, C, H, W) in [-1, 1] by what was observed so far. features are not read."""
        return self._route(self.entropy(images))

    def forward(self, features: Sequence[Tensor] | None, images: Tensor) -> Routing:
        """As `decide`; training mode observes the images after that."""
        entropy = self.entropy(images)
        routing = self._route(entropy)
        if self.training:
            self.observe(entropy)
        return routing

    def _route(self, entropy: Tensor) -> Routing:
        if self.fixed_thresholds is None:
            grains = ranked_grains(entropy, grain_counts(self.shares, entropy[0].numel()))
            if self.per == "dataset":
                by_dataset = torch.bucketize(entropy.double(), self.thresholds)
                grains = torch.where(self.histogram.sum() > 0, by_dataset, grains)
        else:
            grains = torch.bucketize(entropy.double(), self.thresholds)
        return Routing(grains, None, entropy)

    def extra_repr(self) -> str:
        by = f"per={self.per!r}" if self.fixed_thresholds is None else f"thresholds={self.fixed_thresholds}"
        return f"patch_size={self.patch_size}, shares={self.shares}, {by}"


@contextmanager
def accumulate_entropies(model: nn.Module) -> Iterator[None]:
    """The images of all training passes within are routed by what was observed before: gradient accumulation.

    Args:
        model: any module; its entropy routers, wherever they are. Every process enters and leaves alike.
    """
    routers = [module for module in model.modules() if isinstance(module, EntropyRouter)]
    for router in routers:
        router.accumulating = True
    try:
        yield
    except BaseException:
        for router in routers:
            router._noted = None
        raise
    finally:
        for router in routers:
            router.accumulating = False
    for router in routers:
        router.update_histogram()


class RandomRouter(nn.Module):
    """Grains at random, with the same number of codes in every image: what routing by content is measured against.

    Args:
        shares: share of the cells that each finer grain gets, (median, ..., fine); the coarsest gets the rest.
    """

    def __init__(self, shares: Sequence[float] = (0.5,)):
        super().__init__()
        self.shares = check_shares(shares)
        self.grains = len(self.shares) + 1

    def decide(self, features: Sequence[Tensor], images: Tensor | None = None) -> Routing:
        """Features, the first (B, C, Hc, Wc), give the grid. images is not read."""
        batch, _, height, width = features[0].shape
        scores = torch.rand(batch, height, width, device=features[0].device)
        return Routing(ranked_grains(scores, grain_counts(self.shares, height * width)), None, scores)

    forward = decide

    def extra_repr(self) -> str:
        return f"shares={self.shares}"


class FixedRouter(nn.Module):
    """The same grain everywhere: codes of fixed length.

    Args:
        grain: of every cell, in [0, grains).
        grains: number of grains.
    """

    def __init__(self, grain: int, grains: int = 2):
        super().__init__()
        _check_grains(grains)
        if not 0 <= grain < grains:
            raise ValueError(f"grain: expected a number in [0, {grains}), got {grain}")
        self.grain, self.grains = grain, grains

    def decide(self, features: Sequence[Tensor], images: Tensor | None = None) -> Routing:
        """Features, the first (B, C, Hc, Wc), give the grid. images is not read."""
        batch, _, height, width = features[0].shape
        scores = features[0].new_zeros(batch, height, width)
        return Routing(torch.full_like(scores, self.grain, dtype=torch.int64), None, scores)

    forward = decide

    def extra_repr(self) -> str:
        return f"grain={self.grain}, grains={self.grains}"


def straight_through_gate(logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """One-hot draws from softmax(logits) whose gradient is that of the noisy softmax (Jang et al. 2017, section 2.2).

    Args:
        logits: (..., grains) float.
        noise: like logits, Gumbel noise; fresh where None.

    Returns:
        (B, grains, Hc, Wc) for logits (B, Hc, Wc, grains): the grains at dim 1.
    """
    if noise is None:
        noise = -torch.empty_like(logits).exponential_().log()
    soft = (logits + noise).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return (hard + soft - soft.detach()).movedim(-1, 1)


def select_grains(features: Sequence[Tensor], routing: Routing) -> Tensor:
    """One map on the finest grid: each cell from the feature of its grain, coarser ones repeated.

    Where the routing has a gate, the values are multiplied by its entry at the chosen grain: 1, but it carries the
    gradient to the router.

    Args:
        features: grains of (B, C, Hc * 2^g, Wc * 2^g), coarsest first.
        routing: of (B, Hc, Wc) cells.

    Returns:
        (B, C, Hc * 2^(grains - 1), Wc * 2^(grains - 1)).
    """
    finest = len(features) - 1
    grains = repeat_cells(routing.grains[:, None], 2**finest)
    selected = features[-1]
    for grain, feature in enumerate(features[:-1]):
        selected = torch.where(grains == grain, repeat_cells(feature, 2 ** (finest - grain)), selected)
    if routing.gate is not None:
        selected = selected * repeat_cells(routing.gate.gather(1, routing.grains[:, None]), 2**finest)
    return selected


def repeat_cells(x: Tensor, times: int) -> Tensor:
    """(..., H, W) to (..., H * times, W * times), each value repeated in a square."""
    return x.repeat_interleave(times, -2).repeat_interleave(times, -1)


def code_lengths(grains: Tensor) -> Tensor:
    """Number of codes of each image: grain maps (B, Hc, Wc) int64 to (B,) int64."""
    return (4**grains).flatten(1).sum(1)


def grain_counts(shares: Sequence[float], cells: int) -> tuple[int, ...]:
    """Cells of each finer grain, (median, ..., fine), nearest to their shares of `cells`."""
    finer = [round(cells * sum(shares[i:])) for i in range(len(shares))] + [0]
    return tuple(finer[i] - finer[i + 1] for i in range(len(shares)))


def counts_for_codes(target: int, cells: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Cells of each finer grain that give an image a number of codes.

    Args:
        target: codes an image; at least one for each cell, at most all of them.
        cells: cells an image.
        shares: share of the cells that each finer grain usually gets: of all ways to reach the same number, the one
            that is nearest to their proportions is taken.

    Returns:
        (median, ..., fine): their codes add up to `target`, or to the largest number below it that can be reached (a
        cell that gets a finer grain adds 3, 12, ... codes).

    Raises:
        ValueError: a target out of range.
    """
    added = [4 ** (grain + 1) - 1 for grain in range(len(shares))]
    if not cells <= target <= cells * (added[-1] + 1):
        raise ValueError(
            f"target_codes: expected from {cells} (all coarse) to {cells * (added[-1] + 1)} (all fine), got {target}"
        )
    left = target - cells
    if len(shares) == 1:
        return (left // added[0],)
    if len(shares) > 2:
        raise ValueError(f"shares: expected those of one or two finer grains, got {len(shares)}")
    median, fine = shares
    wanted = left * fine / max(median * added[0] + fine * added[1], 1e-12)  # fine cells, in the usual proportion

    def medians(fines: int) -> int:
        return min((left - added[1] * fines) // added[0], cells - fines)

    ways = range(min(left // added[1], cells) + 1)
    best = max(ways, key=lambda fines: (added[1] * fines + added[0] * medians(fines), -abs(fines - wanted)))
    return medians(best), best


def ranked_grains(scores: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """The finest grain to the cells of the highest scores, the next to the next, and so on; ties in raster order.

    Args:
        scores: (B, Hc, Wc) float.
        counts: cells of each finer grain, (median, ..., fine): (grains - 1) for all images, or (B, grains - 1) int64.

    Returns:
        (B, Hc, Wc) int64.
    """
    order = scores.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    counts = torch.as_tensor(counts, device=scores.device).expand(len(scores), -1)
    # A cell has at least grain g if its rank is below the number of cells that do.
    at_least = counts.flip(1).cumsum(1)
    return (rank[..., None] < at_least[:, None]).sum(-1).view_as(scores)


def _expected_grain(logits: Tensor) -> Tensor:
    """(..., grains) to the mean grain (...) under softmax: with two grains, ranked as the logits' margin is."""
    if logits.shape[-1] == 2:
        return (logits[..., 1] - logits[..., 0]).detach()
    return (logits.detach().softmax(-1) * torch.arange(logits.shape[-1], device=logits.device)).sum(-1)


def _shares_below(shares: Sequence[float]) -> list[float]:
    """Share of the cells coarser than grain 1, 2, ..."""
    return [1 - sum(shares[grain:]) for grain in range(len(shares))]


def _check_grains(grains: int) -> None:
    if grains < 2:
        raise ValueError(f"grains: expected at least 2, got {grains}")


def check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """As floats; ValueError where they are negative or exceed 1 together."""
    shares = tuple(float(share) for share in shares)
    if not shares or not min(shares) >= 0 or not sum(shares) <= 1 + 1e-9:
        raise ValueError(
            f"shares: expected numbers of at least 0 that sum to at most 1, one a finer grain, got {shares}"
        )
    return shares
