"""A training from start to end: nothing in the way, the run made or found, the model trained on images or codes."""

import shutil
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from vqfast.cli.encoding import describe, images_for
from vqfast.cli.latents import latents
from vqfast.cli.options import Training, check_out
from vqfast.cli.settings import write_settings
from vqfast.cli.words import several
from vqfast.data import ImageBatches, ImageData
from vqfast.models.dqvae import DynamicCodes, grain_pictures
from vqfast.models.registry import kind_of
from vqfast.train import Run, RunError, create_run, load_autoencoder, load_model, open_run, train
from vqfast.train.checkpoint import INDEX, WEIGHTS, newest_checkpoint, resumable_checkpoint
from vqfast.train.config import FREE_ON_RESUME
from vqfast.train.progress import check_idle
from vqfast.train.runs import RUN_FILE, write_json

# Folders of a run of codes that hold the autoencoder whose codes they are, so that the run stands alone.
AUTOENCODER = "vqvae"
DYNAMIC_AUTOENCODER = "dqvae"
_NAMES = {
    "vqvae": "VQ-VAE",
    "vqgan": "VQGAN",
    "dqvae": "DQ-VAE",
    "vqddm": "VQ-DDM",
    "raster_gpt": "raster-order GPT",
    "dq_transformer": "DQ-Transformer",
}


def start(command: Training) -> PartialState:
    """The processes of a training command, once nothing is in the way of its run; the disk is not touched.

    Raises:
        RunError: --out is taken, or not a run that can be resumed, or in training already, or has more steps behind it
            than asked for.
    """
    processes = PartialState(cpu=command.training.device == "cpu")
    if processes.is_main_process and not command.resume:
        check_out(command.out)
    if processes.is_main_process and command.resume:
        run = open_run(command.out)
        check_idle(run.path)
        checkpoint = resumable_checkpoint(run.path, run.kind, say=lambda text: None)
        if checkpoint is not None and checkpoint.step > command.training.steps:
            raise RunError(
                f"--steps: expected at least {checkpoint.step}, which {run.path} has behind it, "
                f"got {command.training.steps}"
            )
    return processes


def begin(command: Training, kind: str, info: dict[str, Any], processes: PartialState) -> None:
    """Make the run, or make sure that the one to resume was started with the same settings.

    Args:
        command: of the training.
        kind: of the run.
        info: what run.json is to say: "model", "data", ... and "training".
    """
    if processes.is_main_process:
        if command.resume:
            run = open_run(command.out, kind)
            for section, settings in info.items():
                check_same(run, section, settings)
            write_json(run.path / RUN_FILE, {"kind": kind} | run.info | info)
        else:
            create_run(command.out, kind, info)
        write_settings(command.out, command.command, command, info["model"])
    processes.wait_for_everyone()


def train_on_images(
    command: Training,
    model: nn.Module,
    data: ImageData,
    processes: PartialState,
    settings: dict[str, Any] | None = None,
    *,
    flip: bool = False,
) -> nn.Module:
    """Begin the run of a command, and train its model on images.

    Args:
        command, processes: as for `begin`.
        model: an autoencoder.
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
    begin(command, kind_of(model), info | (settings or {}), processes)
    if getattr(model, "has_perceptual_loss", True) is False:
        processes.print("no perceptual loss: --lpips names no weights of it")
    images = ImageBatches(data, crop=size, augment=crops or flip, flip=flip, seed=seed)
    held_out = ImageBatches(data, "held-out", crop=size) if data.held_out.any() else None
    model = train(model, images, command.training, command.out, held_out=held_out, resume=command.resume)
    _say_trained(command, model, several(len(images), "image"), processes)
    return model


def train_on_codes(command: Training, processes: PartialState) -> nn.Module:
    """Begin the run of a command, and train its model on the codes that an autoencoder gives to images.

    Args:
        command: see `vqfast.cli.train_codes.CodeTraining`.
        processes: as for `begin`.

    Returns:
        The model to use, in eval mode.
    """
    source: Path = getattr(command, command.source)
    dynamic = command.source == DYNAMIC_AUTOENCODER
    autoencoder = load_model(source, DYNAMIC_AUTOENCODER) if dynamic else load_autoencoder(source)
    data = images_for(command.data, autoencoder)
    conditional = data.labels is not None and not command.unconditional
    torch.manual_seed(command.training.seed)
    model = command.model(autoencoder, len(data.classes) if conditional else None)
    weights = newest_checkpoint(source).path
    info = {
        "model": {name: v for name, v in asdict(model.config).items() if name not in command.derived},
        "data": describe(data),
        command.source: {"weights": checksum(weights)},
        "training": asdict(command.training),
    }
    begin(command, kind_of(model), info, processes)
    if processes.is_main_process:
        copy_autoencoder(source, weights, command.out / command.source)
    codes, held_out = latents(command, autoencoder, weights, data, processes)
    model = command.fitted(model, codes)

    def pictures(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Held-out images as their codes show them, and as many samples of the same classes."""
        drawn = command.draw(model, len(batch["codes"]), batch.get("label") if conditional else None)
        given = (batch["codes"], batch["grains"]) if dynamic else batch["codes"]
        shown = {}
        for name, codes in (("held out", given), ("samples", drawn)):
            if dynamic:
                codes = DynamicCodes(*codes)
                c = autoencoder.config
                shown[f"{name}, grains"] = grain_pictures(codes.grains, c.grains, c.image_size)
            shown[name] = autoencoder.decode_codes(codes)
        return shown

    settings, out = command.training, command.out
    model = train(model, codes, settings, out, held_out=held_out, resume=command.resume, pictures=pictures)
    _say_trained(command, model, several(len(codes), "encoded image"), processes)
    return model


def copy_autoencoder(run: Path, weights: Path, target: Path) -> None:
    """Put an autoencoder's run, with the checkpoint `weights` of it alone, into the run of a model of its codes."""
    if target.exists():
        return
    folder = target.with_name(f".{target.name}")
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder / weights.relative_to(run)
    checkpoint.mkdir(parents=True)
    shutil.copy(run / RUN_FILE, folder)
    for name in (WEIGHTS, INDEX):
        shutil.copy(weights / name, checkpoint)
    folder.rename(target)


def checksum(checkpoint: Path) -> int:
    """CRC-32 of a checkpoint's weights, by which run.json says what a run was made of."""
    return zlib.crc32((checkpoint / WEIGHTS).read_bytes())


def _say_trained(command: Training, model: nn.Module, examples: str, processes: PartialState) -> None:
    name, steps = _NAMES[kind_of(model)], several(command.training.steps, "step")
    processes.print(f"{command.out}: trained a {name} for {steps} on {examples}")


def check_same(run: Run, section: str, settings: dict[str, Any]) -> None:
    """Raises RunError where a section of a run's run.json is of other settings."""
    for name, value in settings.items():
        free = section == "training" and name in FREE_ON_RESUME
        before = run.info.get(section, {}).get(name)
        # Through JSON, as the recorded value came.
        if not free and before != (list(value) if isinstance(value, tuple) else value):
            raise RunError(f"{run.path}: was started with {section} {name} = {before}, now it is {value}")
