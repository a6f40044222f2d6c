"""Numbers that follow from a module's options: on its device, in no checkpoint."""

from collections.abc import Sequence

import torch
from torch import nn


def register_constant(module: nn.Module, name: str, values: Sequence[int]) -> None:
    """Keep `values` (N,) int64 as a buffer that is not saved.

    Loading a state dict makes it anew: a module built on the meta device, or emptied by `to_empty`, has lost what no
    checkpoint holds, and would read whatever memory it got.
    """
    if not hasattr(module, "_constants"):
        module._constants = {}
        module.register_load_state_dict_post_hook(_restore)
    module._constants[name] = tuple(values)
    module.register_buffer(name, torch.tensor(module._constants[name]), persistent=False)


def _restore(module: nn.Module, incompatible_keys) -> None:
    for name, values in module._constants.items():
        # Weights that were assigned may be elsewhere than a buffer that never left the meta device.
        device = next(module.parameters(), getattr(module, name)).device
        setattr(module, name, torch.tensor(values, device="cpu" if device.type == "meta" else device))
