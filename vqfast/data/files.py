"""Image collections that are files: a folder, or a .zip of one."""

import os
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from vqfast.data.decode import SUFFIXES
from vqfast.data.errors import DataError
from vqfast.data.members import Members


class _Folder:
    def __init__(self, folder: Path, paths: list[PurePosixPath]):
        self._folder, self._paths = folder, paths

    def __call__(self, i: int) -> bytes:
        return (self._folder / self._paths[i]).read_bytes()


class _Zip:
    def __init__(self, path: Path, members: list[str]):
        self._path, self._members = path, members
        self._archive: tuple[int, zipfile.ZipFile] | None = None

    def __call__(self, i: int) -> bytes:
        # Processes that share an open file share its position too, so each opens its own.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = os.getpid(), zipfile.ZipFile(self._path)
        return self._archive[1].read(self._members[i])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_archive": None}


def folder_members(folder: Path) -> Members:
    paths = _images(PurePosixPath(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file())
    return Members(str(folder), [str(p) for p in paths], _Folder(folder, paths), _class_names(paths))


def zip_members(path: Path) -> Members:
    try:
        with zipfile.ZipFile(path) as archive:
            paths = _images(PurePosixPath(i.filename) for i in archive.infolist() if not i.is_dir())
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not a readable .zip: {error}") from error
    names = [str(p) for p in paths]
    return Members(str(path), names, _Zip(path, names), _class_names(paths))


def _images(paths) -> list[PurePosixPath]:
    hidden = lambda p: any(part.startswith((".", "__MACOSX")) for part in p.parts)
    return sorted(p for p in paths if p.suffix.lower() in SUFFIXES and not hidden(p))


def _class_names(paths: list[PurePosixPath]) -> np.ndarray | None:
    """The first folder below the one that all images share, or None where an image lies directly in that."""
    if not paths:
        return None
    folders = [p.parent.parts for p in paths]
    shared = 0
    while all(len(f) > shared and f[shared] == folders[0][shared] for f in folders):
        shared += 1
    if any(len(f) == shared for f in folders):
        return None
    return np.array([f[shared] for f in folders])
