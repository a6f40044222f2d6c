"""What stage 1 made of a data set, kept on disk for stage 2: encoded once, mapped into memory, never stale."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor


def fingerprint(*facts: object) -> str:
    """A name for what a cache was made from, such as the hash of a checkpoint and the checksum of the images."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def cached_latents(
    folder: Path, name: str, key: str, count: int, encode: Callable[[], Iterator[dict[str, Tensor]]]
) -> dict[str, np.ndarray]:
    """The latents of a data set: read from `folder` if they were made under this key, else made now.

    Args:
        folder: of the cache; made if it is not there.
        name: of the set, such as "train". Latents of the same name under another key are removed.
        key: from `fingerprint`, of all that the latents depend on.
        count: N, how many examples `encode` will give.
        encode: gives batches of (n, ...) integer tensors by name, N examples in all.

    Returns:
        (N, ...) read-only arrays by name, mapped from disk.

    Raises:
        ValueError: encode gave another number of examples.
    """
    done = folder / f"{name}-{key}"
    if not done.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{name}-*"):
            shutil.rmtree(stale)
        # Beside, then renamed: a cache that was cut short is never taken for a whole one.
        partial = folder / f".{name}-{key}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write(partial, count, encode())
        partial.rename(done)
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(done.glob("*.npy"))}


def _write(folder: Path, count: int, batches: Iterator[dict[str, Tensor]]) -> None:
    arrays: dict[str, np.memmap] = {}
    filled = 0
    for batch in batches:
        for name, tensor in batch.items():
            values = tensor.cpu().numpy()
            if name not in arrays:
                path = folder / f"{name}.npy"
                # Codes fit in 32 bits; a map of int64 would be twice as large on disk and in the page cache.
                arrays[name] = np.lib.format.open_memmap(path, "w+", np.int32, (count, *values.shape[1:]))
            if filled + len(values) > count:
                raise ValueError(f"encode: expected {count} examples, got at least {filled + len(values)}")
            arrays[name][filled : filled + len(values)] = values
        filled += len(values)
    if filled != count:
        raise ValueError(f"encode: expected {count} examples, got {filled}")
    for array in arrays.values():
        array.flush()
