"""Where a computation must not be touched by mixed precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager:
    """Autocast off on the device of x; the meta device, where shapes are worked out, knows none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
