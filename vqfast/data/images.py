"""A collection of images, and which of them are held out from training."""

from dataclasses import dataclass, field

import numpy as np

from vqfast.data.decoded import DecodedImages
from vqfast.data.errors import DataError

MOST_HELD_OUT = 10_000


@dataclass(frozen=True)
class ImageData:
    """Images of one size, optional class labels, and the fixed split into a training and a held-out part.

    images: (N, H, W, C) uint8, C = 1 (grey) or 3 (RGB): an array, or, where they are too many for memory, what
        decodes those that are indexed.
    keys: (N,) uint32, what the split goes by: a checksum of each image's pixels, so that copies of one image
        always fall on the same side and the order of the images does not matter. Of images that are decoded when
        asked for it is a checksum of the name.
    labels: (N,) int64 in [0, len(classes)), or None.
    classes: the name of each class.
    source: what the user asked for, as it appears in messages.
    """

    source: str
    images: np.ndarray | DecodedImages
    keys: np.ndarray
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    held_out: np.ndarray = field(init=False)  # (N,) bool

    def __post_init__(self):
        object.__setattr__(self, "held_out", hold_out(self.keys))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.images.shape[1:3]

    @property
    def channels(self) -> int:
        return self.images.shape[3]

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (n, H, W, C) at positions (n,), and the positions that they are of: another's for a broken image."""
        if isinstance(self.images, DecodedImages):
            return self.images.read(positions)
        return self.images[positions], positions

    def indices(self, split: str) -> np.ndarray:
        """Positions of the images in a split.

        Args:
            split: "train", "held-out" or "all".

        Returns:
            (M,) int64, ascending.

        Raises:
            ValueError: another split.
            DataError: the split is empty.
        """
        masks = {"train": ~self.held_out, "held-out": self.held_out, "all": np.ones(len(self), dtype=bool)}
        if split not in masks:
            raise ValueError(f"split: expected one of {', '.join(masks)}, got {split!r}")
        found = np.flatnonzero(masks[split])
        if len(found) == 0:
            raise DataError(f"{self.source}: no {split} images among {len(self)}: too few different ones to split")
        return found


def hold_out(keys: np.ndarray) -> np.ndarray:
    """The rule of the split: the eighth of the images with the lowest keys, at most 10,000 of them.

    Images of equal keys stay together. Where no image differs from another, none is held out.

    Args:
        keys: (N,) integers.

    Returns:
        (N,) bool, True where an image is held out.
    """
    count = len(keys)
    if count < 2:
        return np.zeros(count, dtype=bool)
    share = min(max(count // 8, 1), MOST_HELD_OUT)
    held_out = keys <= np.sort(keys)[share - 1]
    return np.zeros(count, dtype=bool) if held_out.all() else held_out
