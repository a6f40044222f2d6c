"""Encoded images into pixels: all of a source at once, or each when it is asked for."""

import logging
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info
from tqdm.auto import tqdm

from vqfast.data.decode import read_image
from vqfast.data.errors import DataError
from vqfast.data.members import Members

MOST_BROKEN = 0.01  # share of a source's images that may be broken before it is refused
_PROBED = 64
_NAMED = 5  # broken images that an error names

_log = logging.getLogger("vqfast.data")

# RuntimeError: an encrypted member of an archive, or one of an unknown compression.
_BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError, zipfile.BadZipFile)


def _decode(members: Members, i: int, image_size: int | None) -> np.ndarray | str:
    """(H, W, C) uint8, or why the image cannot be read."""
    try:
        return read_image(BytesIO(members.read(i)), image_size)
    except _BROKEN as error:
        # Pillow names the buffer's address where a file's name would stand.
        text = str(error)
        return "not a known image format" if "cannot identify" in text else " ".join(text.split())


def _refuse_many(members: Members, broken: list[str], why: str) -> None:
    """broken: names of those known by now. why: what is wrong with the first."""
    if len(broken) > MOST_BROKEN * len(members):
        named = f", also {', '.join(broken[1:_NAMED])}" if broken[1:] else ""
        named += f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        raise DataError(
            f"{members.source}: broken image {broken[0]}: {why}{named} ({len(broken)} broken of {len(members)}; "
            f"up to {MOST_BROKEN:.0%} would be skipped)"
        )


def decode_all(members: Members, image_size: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """(N, H, W, C) uint8 images and their labels, without the broken ones, which are named in a warning.

    Raises:
        DataError: more than 1 % broken, or images of different sizes.
    """
    images, kept, broken = [], [], []
    # Threads: pillow decodes outside the interpreter lock.
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda i: _decode(members, i, image_size), range(len(members)))
        # Shown where somebody looks: an error's one line must not follow the remains of a bar in a log.
        bar = tqdm(decoded, "reading images", len(members), False, unit="image", delay=1, disable=None)
        for i, image in enumerate(bar):
            if isinstance(image, str):
                broken.append((members.names[i], image))
            else:
                images.append(image)
                kept.append(i)
    if broken:
        _refuse_many(members, [name for name, _ in broken], broken[0][1])
        for name, why in broken:
            _log.warning("%s: broken image %s skipped: %s", members.source, name, why)
    return _stack(members, kept, images), None if members.labels is None else members.labels[kept]


def _stack(members: Members, kept: list[int], images: list[np.ndarray]) -> np.ndarray:
    size = images[0].shape[:2]
    for i, image in zip(kept, images, strict=True):
        if image.shape[:2] != size:
            raise DataError(
                f"{members.source}: images of different sizes ({members.names[kept[0]]} is {size[1]}x{size[0]}, "
                f"{members.names[i]} is {image.shape[1]}x{image.shape[0]} pixels): choose one with --image-size"
            )
    channels = max(image.shape[2] for image in images)
    return np.stack([np.broadcast_to(image, (*size, channels)) for image in images])


class DecodedImages:
    """What an (N, H, W, C) uint8 array of all images would be, each decoded when it is asked for.

    A broken image is named in a warning, and the next sound one stands in for it; `read` says which. Workers of a
    loader share the count of the broken ones.

    Images are grey (C = 1) if the first ones, up to 64, all are.

    Args:
        members: the encoded images.
        image_size: side in pixels that every image is resized and cropped to.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, members: Members, image_size: int):
        self._members = members
        self._broken = torch.zeros(len(members), dtype=torch.bool).share_memory_()
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self.shape = (len(members), image_size, image_size, 3)
        first = self[:_PROBED]
        if (first == first[..., :1]).all():
            self.shape = (*self.shape[:3], 1)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, positions) -> np.ndarray:
        """An int gives (H, W, C); a slice or an array of positions (n, H, W, C)."""
        if isinstance(positions, (int, np.integer)):
            return self.read(np.array([range(len(self))[positions]]))[0][0]
        return self.read(np.arange(len(self))[positions])[0]

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (n, H, W, C) uint8 at positions (n,), and the positions that were really read.

        Raises:
            DataError: more than 1 % of all images turned out to be broken.
        """
        # A worker has its core for itself; the main process decodes on all of them.
        decode = map if get_worker_info() else self._threads().map
        images = np.empty((len(positions), *self.shape[1:]), dtype=np.uint8)
        read = np.array(positions, dtype=np.int64)
        for i, image in enumerate(decode(self._decode, positions.tolist())):
            while isinstance(image, str):
                self._skip(int(read[i]), image)
                read[i] = (read[i] + 1) % len(self)
                image = self._decode(int(read[i]))
            images[i] = image if image.shape[2] == self.shape[3] else _with_channels(image, self.shape[3])
        return images, read

    def _decode(self, position: int) -> np.ndarray | str:
        return _decode(self._members, position, self.shape[1])

    def _skip(self, position: int, why: str) -> None:
        if not self._broken[position]:
            self._broken[position] = True
            name = self._members.names[position]
            others = (self._members.names[i] for i in self._broken.nonzero().flatten().tolist() if i != position)
            _refuse_many(self._members, [name, *others], why)
            _log.warning("%s: broken image %s skipped: %s", self._members.source, name, why)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(thread_name_prefix="decode")
        return self._pool[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_pool": None}


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    if channels == 3:
        return np.broadcast_to(image, (*image.shape[:2], 3))
    return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
