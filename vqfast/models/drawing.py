"""What the samplers of all models share."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, whatever mode each module was in again outside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_count(n: int) -> None:
    """Raise ValueError unless n is a number of samples: whole, and at least 1."""
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n: expected a whole number, at least 1, got {n!r}")


def batches(n: int, batch_size: int | None) -> list[slice]:
    """Parts of n samples, `batch_size` at a time; None takes all at once.

    Raises:
        ValueError: n or batch_size is not a whole number of at least 1.
    """
    check_count(n)
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size: expected at least 1, or None, got {batch_size!r}")
    size = batch_size or n
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def token_steps(count: int, progress: bool) -> Iterable[int]:
    """0 to count - 1, with a bar where asked for."""
    if not progress:
        return range(count)
    from tqdm.auto import tqdm  # of the `train` extra: a library call must not need it

    return tqdm(range(count), desc="sampling", unit="token", leave=False)
