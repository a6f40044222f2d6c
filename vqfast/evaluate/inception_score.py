"""Inception score (Salimans et al. 2016): how sure a classifier is of each image, and how varied it finds them all."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InceptionScore:
    """exp of the mean KL divergence of the classes' probabilities of an image from their mean, in equal splits.

    Two of them add up to that of both sets of images. All are float64, on the CPU.

    counts: (S,) images of each split. probabilities: (S, K) sums over them. negentropies: (S,) sums of p log p, nats.
    """

    counts: Tensor
    probabilities: Tensor
    negentropies: Tensor

    @classmethod
    def of(cls, logits: Tensor, splits: Tensor, num_splits: int) -> "InceptionScore":
        """Of logits (N, K), and the split of each image, (N,) int64 in [0, num_splits)."""
        p = logits.double().softmax(1)
        member = torch.nn.functional.one_hot(splits.to(logits.device), num_splits).double()  # (N, S)
        negentropies = -torch.special.entr(p).sum(1)
        return cls(member.sum(0).cpu(), (member.T @ p).cpu(), (member.T @ negentropies).cpu())

    def __add__(self, other: "InceptionScore") -> "InceptionScore":
        return InceptionScore(
            self.counts + other.counts,
            self.probabilities + other.probabilities,
            self.negentropies + other.negentropies,
        )

    def scores(self) -> Tensor:
        """Of each split that holds an image, (at most S,) float64, 1 to K."""
        held = self.counts > 0
        counts, mean = self.counts[held], self.probabilities[held] / self.counts[held, None]
        return torch.exp(self.negentropies[held] / counts + torch.special.entr(mean).sum(1))
