"""`open_dataset`: from what a user names on the command line to an `ImageData`."""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from vqfast.data.arrays import read_digits, read_idx, read_npz
from vqfast.data.decode import fit
from vqfast.data.decoded import DecodedImages, decode_all
from vqfast.data.errors import DataError
from vqfast.data.files import folder_members, zip_members
from vqfast.data.hub import dataset_members, is_saved_dataset
from vqfast.data.images import ImageData
from vqfast.data.members import Members
from vqfast.data.shards import shard_members, shard_paths

MOST_IN_MEMORY = 2 << 30  # bytes of pixels: a larger source is decoded as it is read


def open_dataset(source: str | Path, *, image_size: int | None = None, in_memory: bool | None = None) -> ImageData:
    """Open a collection of images.

    Args:
        source: `digits` (scikit-learn's 1,797 handwritten digits), or the path of
            a folder of images (its subfolders, where all images lie in one, are the classes),
            a .zip of such a folder,
            tar shards as of WebDataset: one .tar, `train-{000..099}.tar` or a folder of .tar files, classes in .cls
                or .json beside the images,
            a folder that Hugging Face's `datasets` saved,
            an .npz with `images` (N, H, W) or (N, H, W, C) uint8 and optional `labels` (N,),
            an MNIST-format idx file, plain or .gz (its labels file is found beside it by the usual name).
        image_size: side in pixels that every image is resized and cropped to; None keeps the images' own
            size, which must then be the same for all.
        in_memory: decode all images now, or each when it is read (files and shards only; needs image_size). None
            decides by size: up to 2 GiB of pixels are kept in memory.

    Returns:
        ImageData, (N, H, W, C) uint8: grey images stay grey unless some are in colour. A broken image is skipped with
        a warning that names it.

    Raises:
        DataError: nothing there, no images, more than 1 % broken (one is named), or arrays of another shape than
            described.
    """
    name = str(source)
    if image_size is not None and image_size < 1:
        raise DataError(f"image size: expected at least 1 pixel, got {image_size}")
    members = _members(name)
    if members is not None:
        if in_memory is None:
            in_memory = image_size is None or 3 * len(members) * image_size**2 <= MOST_IN_MEMORY
        if not in_memory:
            return _decoded_later(members, image_size)
        images, labels = decode_all(members, image_size)
    else:
        images, labels = _arrays(name)
    if len(images) == 0:
        raise DataError(f"{name}: holds no images")
    if image_size is not None:
        images = _fit_all(images, image_size)
    keys = np.array([zlib.crc32(np.ascontiguousarray(image)) for image in images], dtype=np.uint32)
    return ImageData(name, images, keys, *_classes(name, labels, len(images)))


def _decoded_later(members: Members, image_size: int | None) -> ImageData:
    if image_size is None:
        raise DataError(f"{members.source}: images that are decoded as they are read need --image-size")
    keys = np.array([zlib.crc32(name.encode()) for name in members.names], dtype=np.uint32)
    images = DecodedImages(members, image_size)
    return ImageData(members.source, images, keys, *_classes(members.source, members.labels, len(members)))


def _classes(source: str, labels: np.ndarray | None, count: int) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels as numbers (N,) int64, and the name of each."""
    if labels is None:
        return None, ()
    if labels.shape != (count,):
        raise DataError(f"{source}: {count} images but labels of shape {labels.shape}")
    names, numbers = np.unique(labels, return_inverse=True)
    return numbers.astype(np.int64), tuple(str(n) for n in names)


def _members(name: str) -> Members | None:
    """The encoded images of a source, or None where it is an array."""
    shards = shard_paths(name)
    for path in shards or ([] if name == "digits" else [Path(name)]):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    path = Path(name)
    if shards:
        return shard_members(name, shards)
    if name != "digits" and path.is_dir():
        return dataset_members(path) if is_saved_dataset(path) else folder_members(path)
    return zip_members(path) if path.suffix.lower() == ".zip" else None


def _arrays(name: str) -> tuple[np.ndarray, np.ndarray | None]:
    if name == "digits":
        return read_digits()
    path = Path(name)
    if path.suffix.lower() == ".npz":
        return read_npz(path)
    if "idx" in path.name:
        return read_idx(path)
    raise DataError(
        f"{name}: expected a folder of images, a .zip, .tar shards, a saved Hugging Face dataset, an .npz, "
        "an idx or idx.gz file, or the word digits"
    )


def _fit_all(images: np.ndarray, size: int) -> np.ndarray:
    if images.shape[1:3] == (size, size):
        return images
    grey = images.shape[3] == 1
    fitted = [np.asarray(fit(Image.fromarray(i[:, :, 0] if grey else i), size)) for i in images]
    return np.stack(fitted).reshape(len(images), size, size, images.shape[3])
