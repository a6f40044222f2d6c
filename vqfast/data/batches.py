"""From stored images or codes to the batches that a model's `training_step` takes."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vqfast.data.augment import Augmentation, middle
from vqfast.data.errors import DataError
from vqfast.data.images import ImageData

CPU = torch.device("cpu")
# Batches that each worker may be ahead: on a machine that does other things too a worker can lose a tenth of a second.
_WAITING = 4


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """(..., H, W, C) uint8 pixels to (..., C, H, W) float32 in [-1, 1], on the device where they are."""
    channels_first = torch.as_tensor(images).movedim(-1, -3)
    # One pass and one new tensor, scaled in place: fresh memory costs more than the arithmetic.
    return channels_first.to(torch.float32, memory_format=torch.contiguous_format, copy=True).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> np.ndarray:
    """(..., C, H, W) float in [-1, 1] to (..., H, W, C) uint8; values outside are clipped."""
    pixels = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return np.ascontiguousarray(np.moveaxis(pixels.round().to(torch.uint8).cpu().numpy(), -3, -1))


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on a device. Images as stored, (B, H, W, C) uint8, travel as such and are scaled there."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if "image" in moved and moved["image"].dtype == torch.uint8:
        moved["image"] = to_float(moved["image"])
    return moved


class ImageBatches(Dataset):
    """Batches of one split of an `ImageData`, indexed by visits: visit v is of position v modulo the split's length.

    An item is {"image": (B, C, H, W) float32 in [-1, 1], "label": (B,) int64 where the data has labels}. `stored` gives
    the same with images as (B, H, W, C) uint8, a quarter of the bytes: what `read_ahead` asks its workers for.

    Args:
        data: the images.
        split: "train", "held-out" or "all".
        crop: side in pixels of what is given out; None gives whole images.
        augment: cut at a random place and mirror at random, by the visit; otherwise the middle is cut.
        flip: with augment, mirror too.
        seed: of the augmentation.
        most: images, the first of the split; None gives all.

    Raises:
        DataError: a crop larger than the images.
    """

    def __init__(
        self,
        data: ImageData,
        split: str = "train",
        *,
        crop: int | None = None,
        augment: bool = False,
        flip: bool = False,
        seed: int = 0,
        most: int | None = None,
    ):
        if crop is not None and crop > min(data.image_size):
            height, width = data.image_size
            raise DataError(f"{data.source}: a crop of {crop} pixels from images of {width}x{height}")
        self._data = data
        self._positions = data.indices(split)[:most]
        self._crop = crop
        self._augment = Augmentation(crop, flip, seed) if augment else None

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, visits: np.ndarray) -> dict[str, Tensor]:
        return to_device(self.stored(visits), CPU)

    def stored(self, visits: np.ndarray) -> dict[str, Tensor]:
        images, positions = self._data.read(self._positions[visits % len(self)])
        if self._augment is not None:
            images = self._augment(images, visits)
        elif self._crop is not None:
            images = middle(images, self._crop)
        batch = {"image": torch.as_tensor(images)}
        if self._data.labels is not None:
            batch["label"] = torch.from_numpy(self._data.labels[positions])
        return batch


class CodeBatches(Dataset):
    """Batches of encoded images: {"codes": (B, h, w) int64, "label": (B,) int64, "grains": (B, h', w') int64}.

    Indexed by visits, as ImageBatches.

    Args:
        codes: (N, h, w) integers: a tensor, or an array that may be mapped from disk.
        labels: (N,) integers, as codes, or None where there are none.
        grains: (N, h', w') int64 of codes of variable length, or None.
    """

    def __init__(
        self,
        codes: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | None = None,
        grains: Tensor | np.ndarray | None = None,
    ):
        self._codes, self._labels, self._grains = codes, labels, grains

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, visits: np.ndarray) -> dict[str, Tensor]:
        positions = visits % len(self)
        batch = {"codes": torch.as_tensor(self._codes[positions]).long()}
        if self._labels is not None:
            batch["label"] = torch.as_tensor(self._labels[positions]).long()
        if self._grains is not None:
            batch["grains"] = torch.as_tensor(self._grains[positions]).long()
        return batch


class _Stored(Dataset):
    """What a dataset has stored, for the way from a worker."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset

    def __getitem__(self, visits: np.ndarray) -> dict[str, Tensor]:
        return self._dataset.stored(visits)


def read_ahead(
    dataset: Dataset, visits: Iterable[np.ndarray], workers: int = 0, device: torch.device = CPU
) -> Iterator[dict[str, Tensor]]:
    """Batches in order, prepared ahead.

    Args:
        dataset: indexed by an array of visits, gives a batch of tensors. If it has a method `stored` of the same
            arguments, that is asked instead, and may leave images as (B, H, W, C) uint8.
        visits: an array for each batch.
        workers: processes that prepare batches; 0 prepares each when it is asked for.
        device: where the batches go, images as floats.
    """
    # A generator of its own: the loader would draw from the global one.
    numbers = torch.Generator()
    pinned = device.type == "cuda"
    source = _Stored(dataset) if hasattr(dataset, "stored") else dataset
    loader = DataLoader(
        source,
        None,
        sampler=visits,
        num_workers=workers,
        prefetch_factor=_WAITING if workers else None,
        pin_memory=pinned,
        generator=numbers,
    )
    # Where batches are pinned the loader has such a thread of its own.
    batches = _taken_early(iter(loader)) if workers and not pinned else iter(loader)
    return map(partial(to_device, device=device), batches)


def _taken_early(batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The same batches, each taken over from its worker while the one before is in use: that can take milliseconds."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


class ShuffledSteps(Sampler):
    """Visits of each training step's batch: one endless chain of permutations, cut into equal batches.

    A visit is the position of an example plus `count` for every time that it was seen before: a dataset takes it modulo
    its length, and what it does at random to an example it can derive from the visit.

    The batch of a step depends on (seed, step) alone, so that a resumed run sees what an unbroken one would
    have, and each of `world` processes takes its own part of it.

    Args:
        count: number of examples.
        batch_size: examples a step and process.
        steps: the steps to give out, such as range(start, end).
        seed: of the permutations.
        rank, world: which process this is, of how many.
    """

    def __init__(self, count: int, batch_size: int, steps: range, seed: int, rank: int = 0, world: int = 1):
        self._count, self._batch_size, self._steps = count, batch_size, steps
        self._seed, self._rank, self._world = seed, rank, world

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[np.ndarray]:
        shuffled = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((self._seed, epoch)).permutation(self._count) + epoch * self._count
        )
        for step in self._steps:
            place = (step * self._world + self._rank) * self._batch_size
            end = place + self._batch_size
            parts = []
            while place < end:
                epoch, first = divmod(place, self._count)
                parts.append(shuffled(epoch)[first : first + end - place])
                place += len(parts[-1])
            yield np.concatenate(parts)
