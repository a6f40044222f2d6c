"""Sheets of pictures: which images to show, and several versions of the same ones below one another."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vqfast.evaluate.figures import save_grid
from vqfast.train import RunError

COLUMNS = 16


def spread(indices: np.ndarray, n: int) -> np.ndarray:
    """n of the indices, evenly spaced."""
    if n < 1:
        raise RunError(f"--n: expected at least 1, got {n}")
    return indices[np.linspace(0, len(indices) - 1, min(n, len(indices))).round().astype(int)]


def save_versions(
    path: Path, versions: dict[str, np.ndarray], *, title: str, subtitle: str, columns: int = COLUMNS
) -> None:
    """Versions of images by name, each (N, H, W, 1 or 3) uint8, a row for each; where rows are full, more of them."""
    starts = range(0, len(next(iter(versions.values()))), columns)
    rows = [images[start : start + columns] for start in starts for images in versions.values()]
    labels = list(versions) * len(starts)
    save_grid(path, rows, title=title, subtitle=subtitle, labels=labels, group=len(versions))


def rows_of(images: np.ndarray, labels: Sequence[int] | None, classes: Sequence[str]) -> tuple[list, list[str]]:
    """Rows of at most COLUMNS images, one row a class where there are classes, and the rows' names."""
    if labels is None:
        return [images[i : i + COLUMNS] for i in range(0, len(images), COLUMNS)], []
    numbers = np.asarray(labels)
    shown = list(dict.fromkeys(numbers.tolist()))
    return [images[numbers == label][:COLUMNS] for label in shown], [classes[label] for label in shown]
