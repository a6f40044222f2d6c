"""Every operator under torch.vmap: batched rows are more rows, of one call; anything else is a call an example."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqfast.ops import schema

# Positions of the arguments whose leading dimensions are rows that the op treats each by itself. LEADING: as many such
# dimensions as one likes. FIRST: one of them, the samples or images B.
LEADING = {"nearest": (0, 2), "residual_nearest": (0, 2), "lookup_backward": (0, 1, 2, 4)}
FIRST = {
    "posterior": (0, 1, 2, 3),
    "posterior_backward": (0, 1, 2, 3, 4),
    "diffusion_loss": (0, 1, 2, 3, 4, 7),
    "grain_entropy": (0,),
}


def _map(function: Callable, result: Any) -> Any:
    return tuple(map(function, result)) if isinstance(result, tuple) else function(result)


def _rows(op: Callable, size: int, dims: tuple, args: tuple, positions: tuple[int, ...], fold: bool) -> Any:
    """One call, all of whose row arguments have the examples in front of their rows, or folded into these."""

    def with_examples(position: int, value: Tensor) -> Tensor:
        dim = dims[position]
        value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        return value.flatten(0, 1) if fold else value

    args = tuple(
        with_examples(i, value) if i in positions and isinstance(value, Tensor) else value
        for i, value in enumerate(args)
    )
    unfolded = lambda out: out.reshape(size, out.shape[0] // size, *out.shape[1:]) if fold else out
    return _map(unfolded, op(*args))


def _one_by_one(op: Callable, size: int, dims: tuple, args: tuple) -> Any:
    def example(i: int) -> tuple:
        return tuple(a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True))

    results = [op(*example(i)) for i in range(size)]
    if isinstance(results[0], tuple):
        return tuple(map(torch.stack, zip(*results, strict=True)))
    return torch.stack(results)


def _rule(name: str) -> Callable:
    op = getattr(torch.ops.vqfast, name).default
    positions = LEADING.get(name) or FIRST.get(name) or ()

    def rule(info: Any, dims: tuple, *args: Any) -> tuple[Any, Any]:
        if all(dim is None or i in positions for i, dim in enumerate(dims)):
            result = _rows(op, info.batch_size, dims, args, positions, name in FIRST)
        else:
            result = _one_by_one(op, info.batch_size, dims, args)
        return result, _map(lambda _: 0, result)

    return rule


for _name in schema.OPS:
    # One that writes its argument has no place under vmap: see vqfast.ops.transforms.scaled_rows.
    if not _name.endswith("_"):
        torch.library.register_vmap(f"vqfast::{_name}", _rule(_name), lib=schema.LIBRARY)
