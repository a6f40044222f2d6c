"""Mean and covariance of a stream of vectors, in float64: batches and processes in any order give the same figures."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moments of `count` vectors; two of them add up to those of both sets.

    Sums of squares about the mean, merged as by Chan, Golub and LeVeque (1979): a mean far from 0 costs no digits.

    mean: (D,) float64. scatter: (D, D) float64, the sum of (x - mean)(x - mean)^T. Both on the CPU.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Of features (N, D), N at least 1, computed where they are.

        Raises:
            ValueError: another shape.
        """
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features: expected (N, D) with N at least 1, got {tuple(features.shape)}")
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean.cpu(), (centred.T @ centred).cpu())

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        apart = other.mean - self.mean
        between = torch.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased; needs two vectors or more."""
        return self.scatter / (self.count - 1)
