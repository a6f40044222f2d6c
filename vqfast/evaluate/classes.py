"""Do generated images show what they were asked to show? A classifier trained on real images reads them."""

import numpy as np


class Reader:
    """A support-vector classifier of pixels, for small images such as digits.

    Args:
        images: (N, H, W, C) uint8, real images.
        labels: (N,) integers.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        from sklearn.svm import SVC

        self._classifier = SVC(C=10.0, gamma="scale").fit(_rows(images), labels)

    def agreement(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Share of the images (N, H, W, C) uint8 in which it reads their label (N,): 0..1."""
        return float(np.mean(self._classifier.predict(_rows(images)) == labels))


def _rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0
