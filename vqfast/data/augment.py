"""Random windows and mirror images, the same for the same visit of an image whatever the batch or the process."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """What happens to an image at each visit.

    crop: side in pixels of a window at a random place, or None for the whole image.
    flip: mirror every other visit, left to right, at random.
    seed: of both.
    """

    crop: int | None = None
    flip: bool = False
    seed: int = 0

    def __call__(self, images: np.ndarray, visits: np.ndarray) -> np.ndarray:
        """(n, H, W, C) images at visits (n,) to (n, crop, crop, C)."""
        chances = np.stack([np.random.default_rng((self.seed, visit)).random(3) for visit in visits.tolist()])
        if self.crop is not None:
            images = windows(images, self.crop, chances[:, :2])
        if self.flip:
            images = np.where((chances[:, 2] < 0.5)[:, None, None, None], images[:, :, ::-1], images)
        return images


def windows(images: np.ndarray, size: int, places: np.ndarray) -> np.ndarray:
    """A square of each image.

    Args:
        images: (n, H, W, C).
        size: its side in pixels, at most H and W.
        places: (n, 2) in [0, 1): from the first possible row and column to the last; 0.5 is the middle.

    Returns:
        (n, size, size, C).
    """
    free = np.array(images.shape[1:3]) - size
    corners = (places * (free + 1)).astype(np.int64)
    return np.stack([image[y : y + size, x : x + size] for image, (y, x) in zip(images, corners, strict=True)])


def middle(images: np.ndarray, size: int) -> np.ndarray:
    """The middle square of side `size` of each image (n, H, W, C)."""
    top, left = (np.array(images.shape[1:3]) - size) // 2
    return images[:, top : top + size, left : left + size]
