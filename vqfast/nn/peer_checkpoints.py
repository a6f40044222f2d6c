"""Checkpoints of vector-quantize-pytorch, taken by `load_state_dict` as they are: hooks that give ours their names."""

from typing import Any

import torch
from torch import Tensor, nn

# In `_codebook` there; each has a first dimension of codebooks, of size 1 where all heads share one.
_NAMES = {"embed": "codebook", "embed_avg": "embed_avg", "cluster_size": "cluster_size", "initted": "initialised"}


def rename_codebook(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Of a FollowingCodebook: the peer's codebook and averages; when each code was last chosen it does not keep."""
    for theirs, ours in _NAMES.items():
        value = state_dict.pop(f"{prefix}_codebook.{theirs}", None)
        if value is not None:
            state_dict[prefix + ours] = value[0] if value.ndim > getattr(module, ours).ndim else value
            state_dict.setdefault(f"{prefix}idle", torch.zeros_like(module.idle))


def drop_copies(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Of a ResidualVQ: a codebook that stages share is there once for each stage."""
    if not module.shared_codebook:
        return
    kept = f"{prefix}layers.0."
    for name in list(state_dict):
        if name.startswith(f"{prefix}layers.") and "._codebook." in name and not name.startswith(kept):
            del state_dict[name]


def drop_powers_of_two(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Of an LFQ: a table of constants."""
    state_dict.pop(f"{prefix}mask", None)
