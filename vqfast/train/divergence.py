"""Notices a loss that is not finite or explodes, without making the host wait for the device at each step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_NEVER = 2**62
_WINDOW = 100  # steps that the running mean looks back
_TRUST = 20  # losses seen before an explosion can be told from a start


@dataclass(frozen=True)
class Divergence:
    """step: 1, 2, ..., the first that went wrong; loss: its value."""

    step: int
    loss: float

    def __str__(self) -> str:
        if math.isfinite(self.loss):
            return f"the loss exploded to {self.loss:.4g} at step {self.step}"
        return f"the loss or its gradient was not finite ({self.loss}) at step {self.step}"


class DivergenceWatch:
    """Keeps, on the device, the first step whose loss was bad.

    Args:
        explosion: a loss above this many times the running mean of |loss| is bad; 0 looks for infinities and NaN only.
        device: of the losses.
    """

    def __init__(self, explosion: float, device: torch.device):
        self._factor = explosion or math.inf
        self._first = torch.tensor(_NEVER, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._mean = torch.zeros((), dtype=torch.float64, device=device)
        self._seen = 0

    def see(self, loss: Tensor, step: int) -> None:
        """Take in the loss of step `step` (1, 2, ...), a scalar on the device."""
        loss = loss.detach().double()
        size = loss.abs()
        bad = ~loss.isfinite()
        if self._seen >= _TRUST and self._factor < math.inf:
            bad = bad | (size > self._factor * self._mean)
        new = bad & (self._first == _NEVER)
        self._first = torch.where(new, step, self._first)
        self._loss = torch.where(new, loss, self._loss)
        self._seen += 1
        weight = 1 / min(self._seen, _WINDOW)
        self._mean = torch.where(bad, self._mean, self._mean.lerp(size, weight))

    @property
    def state(self) -> Tensor:
        """(2,) float64 on the device: the first bad step, and its loss."""
        return torch.stack([self._first.double(), self._loss])

    @staticmethod
    def read(states: Tensor) -> Divergence | None:
        """What the states (processes, 2) of all processes say; this waits for the device."""
        step, loss = min(states.tolist(), key=lambda state: state[0])
        return None if step >= _NEVER else Divergence(int(step), loss)
