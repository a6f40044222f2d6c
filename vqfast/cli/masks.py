"""Which codes of images are hidden, and what is left for a model to see of them."""

import numpy as np
import torch
from torch import Tensor

from vqfast.cli.encoding import codes_of
from vqfast.models.autoencoder import Autoencoder


def hidden_cells(name: str, count: int, grid: tuple[int, int], seed: int) -> Tensor:
    """(count, h, w) bool, true where a code is hidden."""
    h, w = grid
    rows, columns = torch.arange(h)[:, None], torch.arange(w)[None, :]
    if name == "random":
        order = torch.rand(count, h * w, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
        return (order < h * w // 2).view(count, h, w)
    inside = {
        "centre": (rows >= h // 4) & (rows < h - h // 4) & (columns >= w // 4) & (columns < w - w // 4),
        "left": (columns < w // 2).expand(h, w),
        "right": (columns >= w - w // 2).expand(h, w),
        "top": (rows < h // 2).expand(h, w),
        "bottom": (rows >= h - h // 2).expand(h, w),
    }[name]
    return inside.expand(count, h, w)


def hidden_pixels(cells: Tensor, downsampling: int) -> np.ndarray:
    """Hidden codes (N, h, w) to hidden pixels (N, H, W)."""
    return cells.repeat_interleave(downsampling, 1).repeat_interleave(downsampling, 2).numpy()


def codes_around(autoencoder: Autoencoder, images: np.ndarray, hidden: np.ndarray) -> Tensor:
    """Codes (N, h, w) of images whose hidden pixels (N, H, W) are blanked first.

    A code sees beyond its own pixels, and none may carry what the model is to guess.
    """
    return codes_of(autoencoder, np.where(hidden[..., None], 0, images).astype(np.uint8))
