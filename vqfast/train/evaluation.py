"""What a model does with held-out batches: mean scalars, pictures, histograms."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vqfast.data import to_device

HELD_OUT = "held_out"
_MOST = 2048  # examples looked at
_PICTURED = 8

Pictures = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


@contextmanager
def frozen(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside: eval mode, no gradients, random numbers from `seed`; outside nothing has changed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def held_out_scalars(step: nn.Module, held_out: Dataset, batch_size: int, device: torch.device) -> dict[str, float]:
    """Means of the scalars over the first held-out examples, under held_out/....

    Args:
        step: maps (batch, step) to scalars, see `vqfast.train.parts.PartStep`.
        held_out: indexed by an array of positions.
    """
    totals: dict[str, Tensor] = {}
    count = min(len(held_out), _MOST)
    for first in range(0, count, batch_size):
        positions = np.arange(first, min(first + batch_size, count))
        for name, value in step(to_device(held_out[positions], device), 0).items():
            totals[name] = totals.get(name, 0) + torch.as_tensor(value).detach().double() * len(positions)
    return {f"{HELD_OUT}/{name}": float(value) / count for name, value in totals.items()}


def pictures_of(model: nn.Module, held_out: Dataset, device: torch.device, pictures: Pictures | None) -> dict:
    """Pictures by name, (N, C, H, W) float in [-1, 1], of a few held-out examples: empty where the model has none."""
    draw = pictures or (lambda m, batch: m.evaluation_pictures(batch) if hasattr(m, "evaluation_pictures") else {})
    batch = held_out[np.arange(min(len(held_out), _PICTURED))]
    return draw(model, to_device(batch, device))


def histograms_of(model: nn.Module) -> dict[str, Tensor]:
    """Histograms that the model offers, by name."""
    return model.histograms() if hasattr(model, "histograms") else {}
