"""The user's weights of LPIPS."""

from pathlib import Path

from torch import Tensor

from vqfast.models.converters import lpips_state_dict
from vqfast.nn.perceptual import LPIPS
from vqfast.train import RunError
from vqfast.train.foreign import read_weights


def load_lpips(paths: tuple[Path, ...]) -> LPIPS | None:
    """LPIPS with the weights in these files together; None for no files.

    Raises:
        RunError: a file that cannot be read, or weights that are missing or of another shape.
    """
    if not paths:
        return None
    weights: dict[str, Tensor] = {}
    for path in paths:
        weights |= lpips_state_dict(read_weights(path))
    try:
        return LPIPS(weights)
    except ValueError as error:
        raise RunError(f"{', '.join(map(str, paths))}: {error}") from error
