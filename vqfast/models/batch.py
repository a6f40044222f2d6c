"""What a model takes out of a training batch."""

from collections.abc import Mapping

from torch import Tensor, nn


def entry(batch: Mapping[str, Tensor], name: str, model: nn.Module) -> Tensor:
    """batch[name], which the model needs.

    Raises:
        TypeError: the batch is no mapping.
        ValueError: it has no such entry.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: {type(model).__name__} expected a dict of tensors, got {type(batch).__name__}")
    if name not in batch:
        found = ", ".join(map(str, batch)) or "nothing"
        raise ValueError(f'batch["{name}"]: missing, but {type(model).__name__} needs it; the batch has {found}')
    return batch[name]
