"""The repeated blocks of a model: what is recomputed, and what is sharded, one at a time."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_LISTS = (nn.ModuleList, nn.ModuleDict)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost members of module lists (or dicts) that hold parameters and no buffers.

    A block with buffers may change them as it runs, as batch norm or a codebook does, and then must not run twice.
    """
    found = []
    for child in model.children():
        if isinstance(model, _LISTS) and _plain(child):
            found.append(child)
        else:
            found += blocks(child)
    return found


def _plain(module: nn.Module) -> bool:
    called = type(module).forward is not nn.Module.forward  # else its members are, and it is a mere container
    return called and _any(module.parameters()) and not _any(module.buffers())


def _any(tensors: Iterator[Tensor]) -> bool:
    return next(tensors, None) is not None


def recompute_blocks(model: nn.Module) -> None:
    """Let each block keep its input only and compute the rest anew in the backward pass (Chen et al. 2016).

    The random numbers drawn inside are the same both times, so that the result is the same to the bit.
    """
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
