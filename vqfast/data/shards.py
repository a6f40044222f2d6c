"""Image collections in tar shards, named as WebDataset names them: 000123.jpg beside 000123.cls or .json."""

import json
import os
import re
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm.auto import tqdm

from vqfast.data.decode import SUFFIXES
from vqfast.data.errors import DataError
from vqfast.data.members import Members

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def shard_paths(name: str) -> list[Path] | None:
    """The shards that a name stands for, or None where it names none: a .tar, `train-{000..099}.tar`, or a folder
    that holds nothing but .tar files."""
    if name.endswith(".tar"):
        found = _RANGE.search(name)
        if not found:
            return [Path(name)]
        first, last = found.groups()
        numbers = range(int(first), int(last) + 1)
        return [Path(f"{name[: found.start()]}{i:0{len(first)}}{name[found.end() :]}") for i in numbers]
    folder = Path(name)
    if not folder.is_dir():
        return None
    inside = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    return inside if inside and all(p.suffix == ".tar" for p in inside) else None


class _Shards:
    """Reads a member by its place in its shard: no tar archive is walked twice."""

    def __init__(self, paths: list[Path], shard: np.ndarray, offset: np.ndarray, size: np.ndarray):
        self._paths, self._shard, self._offset, self._size = paths, shard, offset, size
        self._files: dict[int, int] = {}

    def __call__(self, i: int) -> bytes:
        shard = int(self._shard[i])
        if shard not in self._files:
            self._files[shard] = os.open(self._paths[shard], os.O_RDONLY)
        # pread has no position that processes and threads could share.
        return os.pread(self._files[shard], int(self._size[i]), int(self._offset[i]))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}


def shard_members(source: str, paths: list[Path]) -> Members:
    """Index the shards: the images in their order, and the class that the file of the same name gives.

    A class is the text of .cls, or "label" (else "cls") of .json; either all images have one or none.
    """
    names, places, labels = [], [], []
    with tqdm(paths, desc="indexing shards", unit="shard", leave=False, delay=1, disable=None) as bar:
        for shard, path in enumerate(bar):
            for key, image, label in _samples(path):
                names.append(f"{path.name}:{image.name}")
                places.append((shard, image.offset_data, image.size))
                labels.append(label)
                if (label is None) != (labels[0] is None):
                    raise DataError(f"{path}: {key} {'lacks' if label is None else 'has'} a class, unlike {names[0]}")
    shard, offset, size = np.array(places, dtype=np.int64).reshape(-1, 3).T
    classes = np.array(labels) if labels and labels[0] is not None else None
    return Members(source, names, _Shards(paths, shard, offset, size), classes)


def _samples(path: Path):
    """(key, image member, class or None) of each sample of a shard; a sample's files stand together."""
    try:
        with tarfile.open(path, "r:") as archive:
            key, image, label = None, None, None
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isfile() or name.name.startswith("."):
                    continue
                stem, _, suffix = name.name.partition(".")
                this = str(name.with_name(stem))
                if this != key:
                    if image is not None:
                        yield key, image, label
                    key, image, label = this, None, None
                if f".{suffix.lower()}" in SUFFIXES:
                    image = member
                elif suffix in ("cls", "json"):
                    label = _class(path, member.name, archive.extractfile(member).read(), suffix)
            if image is not None:
                yield key, image, label
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not a readable .tar: {error}") from error


def _class(path: Path, name: str, data: bytes, suffix: str):
    try:
        if suffix == "cls":
            text = data.decode().strip()
            return int(text) if text.lstrip("-").isdigit() else text
        fields = json.loads(data)
        return fields.get("label", fields.get("cls"))
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: {name}: no class to be read from it: {error}") from error
