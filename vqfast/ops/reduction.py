"""Sums whose bits do not depend on the number of threads."""

import torch
from torch import Tensor

_BLOCK = 1024


def ordered_sum(values: Tensor) -> Tensor:
    """Sum of all elements, in blocks of a fixed size: torch cuts a plain sum into one part per thread."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.shape[0] % _BLOCK)).view(-1, _BLOCK).sum(1).sum()
