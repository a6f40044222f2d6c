"""What training commands share: the run's beginning, the data's description, encoding, the training itself."""

import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm

from vqfast.cli.settings import write_settings
from vqfast.data import DataError, ImageBatches, ImageData, open_dataset, read_ahead
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.dqvae import DQVAE, DynamicCodes
from vqfast.models.registry import kind_of
from vqfast.train import RunError, check_new, create_run, open_run, train
from vqfast.train.checkpoint import resumable_checkpoint
from vqfast.train.config import FREE_ON_RESUME
from vqfast.train.progress import check_idle
from vqfast.train.runs import RUN_FILE, write_json

# Folders of a run of codes that hold the autoencoder whose codes they are, so that the run stands alone.
AUTOENCODER = "vqvae"
DYNAMIC_AUTOENCODER = "dqvae"
_NAMES = {"vqvae": "VQ-VAE", "vqgan": "VQGAN", "dqvae": "DQ-VAE"}


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
    places = [positions.numpy() for positions in torch.arange(len(images)).split(256)]
    bar = tqdm(read_ahead(images, places, workers), f"encoding {split}", len(places), unit="batch", leave=False)
    for batch in bar:
        with torch.no_grad():
            yield batch, autoencoder.encode(batch["image"].to(device))


def check_channels(data: ImageData, autoencoder: Autoencoder | DQVAE) -> None:
    """Raises DataError where grey images meet a model of coloured ones, or the other way round."""
    expected = autoencoder.config.in_channels
    if data.channels != expected:
        names = {1: "grey", 3: "coloured"}
        raise DataError(f"{data.source}: {names[data.channels]} images, but the VQ-VAE takes {names[expected]} ones")


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


def pick_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")


def start(command: Any) -> PartialState:
    """The processes of a training command, once nothing is in the way of its run; the disk is not touched.

    Args:
        command: has out, resume and training, as every training command.

    Raises:
        RunError: --out is taken, or not a run to resume, or in training already.
    """
    config = command.training
    processes = PartialState(cpu=config.device == "cpu")
    if processes.is_main_process and not command.resume:
        check_new(command.out)
    if processes.is_main_process and command.resume:
        check_idle(open_run(command.out).path)
    return processes


def begin(command: Any, name: str, info: dict[str, Any], processes: PartialState, *, kind: str | None = None) -> None:
    """Make the run, or make sure that the one to resume was started with the same settings and can be resumed.

    Args:
        command: as for `start`.
        name: of the command, such as "train vqvae"; its last word is the run's kind, unless given.
        info: what run.json is to say: "model", "data", ... and "training".
    """
    if processes.is_main_process:
        kind = kind or name.split()[-1]
        if command.resume:
            _check_same(command.out, kind, info)
            resumable_checkpoint(command.out, kind, say=lambda text: None)
            run = open_run(command.out, kind)
            write_json(run.path / RUN_FILE, {"kind": kind} | run.info | info)
        else:
            create_run(command.out, kind, info)
        write_settings(command.out, name, command, info["model"])
    processes.wait_for_everyone()


def square_images(source: str, image_size: int | None) -> ImageData:
    """Images of one square size.

    Raises:
        DataError: they cannot be read, or are not square.
    """
    data = open_dataset(source, image_size=image_size)
    height, width = data.image_size
    if height != width:
        raise DataError(f"{source}: images of {width}x{height} pixels: choose a square with --image-size")
    return data


def open_square(command: Any) -> tuple[ImageData, int]:
    """The images of a command's `data`, all of one square size, and the side in pixels that its model is to have.

    With random_crop_from they are larger than the model's, which gets a part of each.

    Raises:
        DataError: they cannot be read, or are not square, or smaller than their parts.
    """
    whole, size = command.random_crop_from, command.image_size
    if whole is not None and (size is None or size > whole):
        raise DataError(f"--random-crop-from {whole}: expected an --image-size of at most as many pixels, got {size}")
    data = square_images(command.data, whole or size)
    return data, size or data.image_size[0]


def train_on_images(
    command: Any,
    name: str,
    model: nn.Module,
    data: ImageData,
    processes: PartialState,
    settings: dict[str, Any] | None = None,
    *,
    flip: bool = False,
) -> nn.Module:
    """Begin the run of a command, and train its model on images.

    Args:
        command, name, processes: as for `begin`.
        model: of a kind that the registry knows.
        data: its images; where they are larger than the model's, training sees a random part of each at every visit,
            and the look at held-out ones their middle.
        settings: sections of run.json beside model, data, augmentation and training.
        flip: mirror training images at random.

    Returns:
        The model to use, in eval mode.
    """
    size, seed = model.config.image_size, command.training.seed
    crops = data.image_size[0] != size
    info = {
        "model": asdict(model.config),
        "data": describe(data),
        # None where there is none, as in runs from before there was any.
        "augmentation": {"random_crop": size if crops else None, "flip": flip or None},
        "training": asdict(command.training),
    }
    begin(command, name, info | (settings or {}), processes, kind=kind_of(model))
    images = ImageBatches(data, crop=size, augment=crops or flip, flip=flip, seed=seed)
    held_out = ImageBatches(data, "held-out", crop=size) if data.held_out.any() else None
    model = train(model, images, command.training, command.out, held_out=held_out, resume=command.resume)
    steps = command.training.steps
    processes.print(f"{command.out}: trained a {_NAMES[kind_of(model)]} for {steps} steps on {len(images)} images")
    return model


def mults_for(image_size: int) -> tuple[int, ...]:
    """Levels that leave a grid of about 4 to 16 codes a side."""
    if image_size <= 16:
        return (1, 2)
    if image_size <= 64:
        return (1, 2, 2)
    if image_size <= 128:
        return (1, 2, 2, 4)
    return (1, 1, 2, 2, 4)


def _check_same(out: Path, kind: str, info: dict[str, Any]) -> None:
    run = open_run(out, kind)
    for section, settings in info.items():
        for name, value in settings.items():
            free = section == "training" and name in FREE_ON_RESUME
            before = run.info.get(section, {}).get(name)
            # Through JSON, as the recorded value came.
            if not free and before != (list(value) if isinstance(value, tuple) else value):
                raise RunError(f"{out}: was started with {section} {name} = {before}, now it is {value}")
