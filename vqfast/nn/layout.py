"""Where the channels of a module's input stand."""

from torch import Tensor

from vqfast.ops.checks import check_float


def channels_last(x: Tensor, dim: int, channel_first: bool) -> Tensor:
    """(B, ..., dim), or (B, dim, ...) where channel_first, as a view (B, ..., dim).

    Raises:
        TypeError: not a float tensor.
        ValueError: fewer than two dimensions, or another number of channels than dim.
    """
    check_float("x", x)
    if x.ndim < 2 or x.shape[1 if channel_first else -1] != dim:
        layout = f"(B, {dim}, ...)" if channel_first else f"(B, ..., {dim})"
        raise ValueError(f"x: expected shape {layout}, got {tuple(x.shape)}")
    return x.movedim(1, -1) if channel_first else x
