"""What a folder, an archive or a set of shards offers: encoded images by number, their names and classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vqfast.data.decode import SUFFIXES
from vqfast.data.errors import DataError


class Reader(Protocol):
    """Gives the bytes of image i. Survives pickling and forking: the workers of a loader hold copies of it."""

    def __call__(self, i: int) -> bytes: ...


@dataclass(frozen=True)
class Members:
    """Encoded images of one source, in a fixed order.

    names: of each image, for messages; read: its bytes; labels: (N,) of any kind that sorts, or None.
    """

    source: str
    names: Sequence[str]
    read: Reader
    labels: np.ndarray | None = None

    def __post_init__(self):
        if not self.names:
            raise DataError(f"{self.source}: holds no images ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.names)
