"""A moving average of a model's weights, which samples better than the weights themselves."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Exponential moving average of the parameters; buffers are copied as they are.

    The decay rises from 2 / 11 as (1 + step) / (10 + step) up to `decay`, so that a short training is not
    held back by the weights it started from.

    Args:
        model: averaged from its present state on.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after training step `step` (1, 2, ...)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, weights = list(self.model.parameters()), list(model.parameters())
        get_ema_multi_avg_fn(decay)(averages, weights, step)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
