"""Images to codes and back, as commands need it: a whole split, behind a bar."""

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vqfast.data import DataError, ImageBatches, ImageData, open_dataset, read_ahead, to_float, to_uint8
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.dqvae import DQVAE, DynamicCodes

BATCH = 256


def images_for(source: str, autoencoder: Autoencoder | DQVAE) -> ImageData:
    """Images as an autoencoder takes them.

    Raises:
        DataError: they cannot be read; grey images meet a model of coloured ones, or the other way round.
    """
    config = autoencoder.config
    data = open_dataset(source, image_size=config.image_size)
    check_channels(data, config.in_channels)
    return data


def check_channels(data: ImageData, expected: int) -> None:
    """Raises DataError where images have another number of channels."""
    if data.channels != expected:
        names = {1: "grey", 3: "coloured"}
        found, taken = names[data.channels], names[expected]
        raise DataError(f"{data.source}: {found} images, but the autoencoder takes {taken} ones")


def describe(data: ImageData) -> dict[str, Any]:
    """What run.json says of the data: enough to see that it is the same."""
    return {
        "source": data.source,
        "images": len(data),
        "image_size": data.image_size[0],
        "channels": data.channels,
        "classes": list(data.classes),
        "checksum": zlib.crc32(data.keys.tobytes()),
    }


def labels_of(data: ImageData, split: str) -> Tensor | None:
    """(N,) int64 labels of a split of the data, where it has labels."""
    return None if data.labels is None else labels_at(data, data.indices(split))


def labels_at(data: ImageData, positions: np.ndarray) -> Tensor:
    """(n,) int64 labels of the images at these positions of data that has labels."""
    return torch.from_numpy(data.labels[positions])


def encode(autoencoder: Autoencoder, data: ImageData, split: str) -> Tensor:
    """Codes of a split of the data: (N, h, w) int64 on the CPU."""
    return torch.cat([codes.cpu() for _, codes in encoded(autoencoder, data, split)])


def encode_dynamic(autoencoder: DQVAE, data: ImageData, split: str) -> DynamicCodes:
    """Codes (N, H, W) and grains (N, h, w) of a split of the data, on the CPU."""
    parts = [(part.codes.cpu(), part.grains.cpu()) for _, part in encoded(autoencoder, data, split)]
    return DynamicCodes(*(torch.cat(values) for values in zip(*parts, strict=True)))


def encoded(
    autoencoder: nn.Module, data: ImageData, split: str, workers: int = 0
) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """The batches of a split, read by so many processes, and what the autoencoder's `encode` gives for each."""
    images = ImageBatches(data, split)
    device = next(autoencoder.parameters()).device
    places = [positions.numpy() for positions in torch.arange(len(images)).split(BATCH)]
    bar = tqdm(read_ahead(images, places, workers, device), f"encoding {split}", len(places), unit="batch", leave=False)
    for batch in bar:
        with torch.no_grad():
            yield batch, autoencoder.encode(batch["image"])


@torch.no_grad()
def codes_of(autoencoder: Autoencoder, images: np.ndarray) -> Tensor:
    """Images (N, H, W, C) uint8 to codes (N, h, w), on the autoencoder's device."""
    device = next(autoencoder.parameters()).device
    return torch.cat([autoencoder.encode(part) for part in to_float(images).to(device).split(BATCH)])


@torch.no_grad()
def decode(autoencoder: Autoencoder | DQVAE, codes: Tensor) -> np.ndarray:
    """(N, h, w) codes to (N, H, W, C) uint8."""
    device = next(autoencoder.parameters()).device
    return np.concatenate([to_uint8(autoencoder.decode_codes(part.to(device))) for part in codes.split(BATCH)])
