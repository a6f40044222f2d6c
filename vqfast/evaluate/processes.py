"""One evaluation by several processes: who takes which batch, and the sum of what all have found."""

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

T = TypeVar("T")


def rank_and_count() -> tuple[int, int]:
    """Which process this is, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_batches(count: int, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """The batches of 0..count - 1 that fall to this process: the number of each, and its positions."""
    rank, processes = rank_and_count()
    for number in range(rank, -(-count // batch_size), processes):
        yield number, np.arange(number * batch_size, min((number + 1) * batch_size, count))


def from_all(value: T) -> list[T]:
    """What each process gives, in their order: in the first process; none in the others.

    Tensors in it must be on the CPU, and all processes must give theirs at the same time.
    """
    rank, processes = rank_and_count()
    if processes == 1:
        return [value]
    found: list[Any] | None = [None] * processes if rank == 0 else None
    dist.gather_object(value, found)
    return found or []


def total(parts: list[T]) -> T | None:
    """The sum of what all processes found in their batches: in the first process; None in the others.

    A process that had no batch gives no parts.
    """
    found = [value for value in from_all(reduce(add, parts) if parts else None) if value is not None]
    return reduce(add, found) if found else None
