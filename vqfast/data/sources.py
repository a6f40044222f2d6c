"""`open_dataset`: from what a user names on the command line to an `ImageData`."""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from vqfast.data.arrays import read_digits, read_idx, read_npz
from vqfast.data.decode import fit
from vqfast.data.errors import DataError
from vqfast.data.files import read_folder, read_zip
from vqfast.data.images import ImageData


def open_dataset(source: str | Path, *, image_size: int | None = None) -> ImageData:
    """Read a collection of images into memory.

    Args:
        source: `digits` (scikit-learn's 1,797 handwritten digits), or the path of
            a folder of images (its subfolders, where all images lie in one, are the classes),
            a .zip of such a folder,
            an .npz with `images` (N, H, W) or (N, H, W, C) uint8 and optional `labels` (N,),
            an MNIST-format idx file, plain or .gz (its labels file is found beside it by the usual name).
        image_size: side in pixels that every image is resized and cropped to; None keeps the images' own
            size, which must then be the same for all.

    Returns:
        ImageData, (N, H, W, C) uint8: grey images stay grey unless some are in colour.

    Raises:
        DataError: nothing there, no images, a broken one (named), or arrays of another shape than described.
    """
    name = str(source)
    if image_size is not None and image_size < 1:
        raise DataError(f"image size: expected at least 1 pixel, got {image_size}")
    images, labels = _read(name, image_size)
    if len(images) == 0:
        raise DataError(f"{name}: holds no images")
    if image_size is not None:
        images = _fit_all(images, image_size)
    classes: tuple[str, ...] = ()
    if labels is not None:
        if labels.shape != (len(images),):
            raise DataError(f"{name}: {len(images)} images but labels of shape {labels.shape}")
        names, labels = np.unique(labels, return_inverse=True)
        classes = tuple(str(n) for n in names)
        labels = labels.astype(np.int64)
    keys = np.array([zlib.crc32(np.ascontiguousarray(image)) for image in images], dtype=np.uint32)
    return ImageData(name, images, keys, labels, classes)


def _read(name: str, image_size: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    if name == "digits":
        return read_digits()
    path = Path(name)
    if not path.exists():
        raise DataError(f"{name}: no such file or folder")
    if path.is_dir():
        return read_folder(path, image_size)
    if path.suffix.lower() == ".zip":
        return read_zip(path, image_size)
    if path.suffix.lower() == ".npz":
        return read_npz(path)
    if "idx" in path.name:
        return read_idx(path)
    raise DataError(f"{name}: expected a folder of images, a .zip, an .npz, an idx or idx.gz file, or the word digits")


def _fit_all(images: np.ndarray, size: int) -> np.ndarray:
    if images.shape[1:3] == (size, size):
        return images
    grey = images.shape[3] == 1
    fitted = [np.asarray(fit(Image.fromarray(i[:, :, 0] if grey else i), size)) for i in images]
    return np.stack(fitted).reshape(len(images), size, size, images.shape[3])
