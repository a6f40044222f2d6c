"""Image collections that are files: a folder, or a .zip of one."""

import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from vqfast.data.decode import SUFFIXES, read_image
from vqfast.data.errors import DataError

# RuntimeError: an encrypted member of an archive, or one of an unknown compression.
_BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError, zipfile.BadZipFile)


def read_folder(folder: Path, image_size: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    paths = [PurePosixPath(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file()]
    return _read_files(str(folder), paths, lambda p: (folder / p).read_bytes(), image_size)


def read_zip(path: Path, image_size: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            paths = [PurePosixPath(i.filename) for i in archive.infolist() if not i.is_dir()]
            return _read_files(str(path), paths, lambda p: archive.read(str(p)), image_size)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not a readable .zip: {error}") from error


def _read_files(
    source: str,
    paths: list[PurePosixPath],
    read: Callable[[PurePosixPath], bytes],
    image_size: int | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """(N, H, W, C) images in the order of their paths, and the class of each, or None (see _class_names)."""
    hidden = lambda p: any(part.startswith((".", "__MACOSX")) for part in p.parts)
    paths = sorted(p for p in paths if p.suffix.lower() in SUFFIXES and not hidden(p))
    if not paths:
        raise DataError(f"{source}: holds no images ({', '.join(SUFFIXES)})")

    def decode(path: PurePosixPath) -> np.ndarray:
        try:
            return read_image(BytesIO(read(path)), image_size)
        except _BROKEN as error:
            raise DataError(f"{source}: broken image {path}: {_one_line(error)}") from error

    # Threads: pillow decodes outside the interpreter lock. ZipFile.read holds its own lock.
    with ThreadPoolExecutor() as pool:
        bar = tqdm(total=len(paths), desc="reading images", unit="image", leave=False, delay=1)
        images = []
        for image in pool.map(decode, paths):
            images.append(image)
            bar.update()
        bar.close()
    return _stack(source, paths, images), _class_names(paths)


def _one_line(error: Exception) -> str:
    # Pillow names the buffer's address where a file's name would stand.
    return "not a known image format" if "cannot identify" in str(error) else " ".join(str(error).split())


def _stack(source: str, paths: list[PurePosixPath], images: list[np.ndarray]) -> np.ndarray:
    size = images[0].shape[:2]
    for path, image in zip(paths, images, strict=True):
        if image.shape[:2] != size:
            raise DataError(
                f"{source}: images of different sizes ({paths[0]} is {size[1]}x{size[0]}, "
                f"{path} is {image.shape[1]}x{image.shape[0]} pixels): choose one with --image-size"
            )
    channels = max(image.shape[2] for image in images)
    return np.stack([np.broadcast_to(image, (*size, channels)) for image in images])


def _class_names(paths: list[PurePosixPath]) -> np.ndarray | None:
    """The first folder below the one that all images share, or None where an image lies directly in that."""
    folders = [p.parent.parts for p in paths]
    shared = 0
    while all(len(f) > shared and f[shared] == folders[0][shared] for f in folders):
        shared += 1
    if any(len(f) == shared for f in folders):
        return None
    return np.array([f[shared] for f in folders])
