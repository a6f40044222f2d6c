"""Which batch and which random numbers each step gets: by its place alone, so that nothing has to be remembered."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqfast.data import ShuffledSteps, read_ahead
from vqfast.train.config import TrainConfig


class Feed:
    """Batches of one process among `processes`, `accumulation` of them a step.

    Args:
        dataset: indexed by an array of visits, gives a batch of tensors; see vqfast.data.batches.ShuffledSteps.
        config: how to train.
        rank, processes: which process this is, of how many.
        device: where batches go.
    """

    def __init__(self, dataset: Dataset, config: TrainConfig, rank: int, processes: int, device: torch.device):
        self._dataset, self._config = dataset, config
        self._rank, self._processes, self._device = rank, processes, device
        self._shift = 0

    def batches(self, step: int) -> int:
        """How many batches all processes have taken before a step."""
        return step * self._config.accumulation * self._processes + self._shift

    def go_on(self, step: int, batches: int) -> None:
        """Let step `step` follow upon so many batches, which another number of processes may have taken."""
        self._shift += batches - self.batches(step)

    def images(self, steps: int) -> int:
        """How many images all processes take in so many steps."""
        return steps * self._config.batch_size * self._config.accumulation * self._processes

    def steps(self, start: int) -> Iterator[list[dict[str, Tensor]]]:
        """The batches of each step from `start` on."""
        places = self._places(start, self._config.steps, self._rank)
        batches = read_ahead(self._dataset, places, self._config.workers, self._device)
        for _ in range(start, self._config.steps):
            yield [next(batches) for _ in range(self._config.accumulation)]

    def noise_seed(self, step: int, number: int, part: int) -> int:
        """Seed of the random numbers of a part's pass over batch `number` of a step.

        Two processes of one batch each draw what one process of two batches draws.
        """
        place = self.batches(step) + number * self._processes + self._rank
        return int(np.random.SeedSequence((self._config.seed, place, part)).generate_state(1, np.uint64)[0] >> 1)

    def positions(self, step: int) -> np.ndarray:
        """Positions in the dataset of all images of a step, those of the other processes too."""
        visits = [v for rank in range(self._processes) for v in self._places(step, step + 1, rank)]
        return np.concatenate(visits) % len(self._dataset)

    def _places(self, first: int, last: int, rank: int) -> ShuffledSteps:
        taken = range(self.batches(first) + rank, self.batches(last), self._processes)
        return ShuffledSteps(len(self._dataset), self._config.batch_size, taken, self._config.seed)
