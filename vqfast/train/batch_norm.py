"""Running statistics of batch norms: one step for all batches of a training step, the same in every process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqfast.nn.codebook import sum_over_processes


class RunningStatistics:
    """The means and variances that a model's batch norms keep for evaluation.

    They are moving averages, and so the mean of what several batches would each make of them is what the mean of these
    batches' statistics makes of them. The batches of a step start from the same values, whether they are taken in turn
    or by several processes, and leave that mean.

    Normalisation in training is by each batch's own statistics, as in the code released with VQGAN, and unlike
    SyncBatchNorm the same whether batches come in turn or in several processes.

    Args:
        model: what is trained.
        processes: how many train it.
    """

    def __init__(self, model: nn.Module, processes: int):
        self._processes = processes
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        norms = [module for module in norms if module.track_running_stats]
        self._counts = [module.num_batches_tracked for module in norms]
        self._means = [kept for module in norms for kept in (module.running_mean, module.running_var)]
        self._before: list[Tensor] | None = None

    @contextmanager
    def averaged(self, batches: int) -> Iterator[None]:
        """One step of so many batches, each of which is taken inside `batch`."""
        alone = batches == 1 and self._processes == 1
        if alone or not self._means:
            yield
            return
        self._before = [kept.clone() for kept in self._counts + self._means]
        self._sum = 0
        yield
        mean = sum_over_processes(self._sum) / (batches * self._processes)
        torch._foreach_copy_(self._means, list(mean.split([len(kept) for kept in self._means])))
        self._before = None

    @contextmanager
    def batch(self) -> Iterator[None]:
        if self._before is not None:
            torch._foreach_copy_(self._counts + self._means, self._before)
        yield
        if self._before is not None:
            self._sum = self._sum + torch.cat(self._means)
