"""Image collections that are arrays already: .npz, MNIST-format idx, scikit-learn's digits."""

import gzip
import zipfile
import zlib
from pathlib import Path

import numpy as np

from vqfast.data.errors import DataError


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: (1797, 8, 8, 1) uint8, grey levels 0..16 spread over 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None], digits.target


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if "images" not in file:
                found = ", ".join(file.files) or "none"
                raise DataError(f"{path}: expected an array named images, got {found}")
            images = file["images"]
            labels = file["labels"] if "labels" in file else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a readable .npz: {error}") from error
    if images.dtype != np.uint8:
        raise DataError(f"{path}: expected images of dtype uint8 (0..255), got {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise DataError(f"{path}: expected images (N, H, W), (N, H, W, 1) or (N, H, W, 3), got {images.shape}")
    return images, labels


def read_idx(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    images = _idx_array(path)
    if images.ndim != 3:
        raise DataError(f"{path}: expected images (N, H, W), got an array of shape {images.shape}")
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    labels = None
    if beside != path and beside.exists():
        labels = _idx_array(beside)
    return images[..., None], labels


def _idx_array(path: Path) -> np.ndarray:
    """LeCun's idx format: two zero bytes, type 8 (uint8), number of dimensions, sizes as big-endian int32."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: broken gzip file: {error}") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise DataError(f"{path}: not an idx file of uint8 values")
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise DataError(f"{path}: cut short inside its header")
    shape = tuple(int(n) for n in np.frombuffer(data, ">i4", data[3], offset=4))
    if len(data) - header != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path}: header says {shape}, but {len(data) - header} bytes follow")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
