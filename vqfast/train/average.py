"""A moving average of a model's weights, which samples better than the weights themselves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vqfast.train.processes import local


class WeightAverage:
    """Exponential moving average of parameters.

    The decay rises from 2 / 11 as (1 + step) / (10 + step) up to `decay`, so that a short training is not
    held back by the weights it started from.

    Args:
        parameters: averaged from their present values on. Of a sharded parameter each process keeps its part.
        decay: in [0, 1).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self._parameters = [local(p.detach()) for p in parameters]
        self.values = [p.clone() for p in self._parameters]
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after training step `step` (1, 2, ...)."""
        get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))(self.values, self._parameters, step)

    def apply(self) -> None:
        """Give the parameters their averages."""
        _copy(self._parameters, self.values)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold their averages."""
        before = [p.clone() for p in self._parameters]
        self.apply()
        try:
            yield
        finally:
            _copy(self._parameters, before)


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_copy_(targets, sources)
