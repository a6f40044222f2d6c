"""Options that several commands have: the same words for the same thing everywhere."""

import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from tyro.conf import Positional

from vqfast.train import RunError, TrainConfig, check_new


@dataclass(kw_only=True)
class Training:
    """What every command that trains has."""

    command: ClassVar[str]  # its words, such as "train vqvae"

    data: str
    """Images: see vqfast train vqvae."""
    out: Path
    """Folder of the run; made, and never overwritten."""
    resume: bool = False
    """Go on where the run in --out stopped: the same command with this added."""
    training: TrainConfig = field(default_factory=TrainConfig)


@dataclass(kw_only=True)
class OfRun:
    """What every command has that uses a trained model."""

    run: Positional[Path]
    """Run of the model."""
    out: Path
    """Folder to make."""


@dataclass(kw_only=True)
class OfImages(OfRun):
    """What every command has that sends images through a trained model."""

    data: str
    """Images: see vqfast train vqvae."""
    split: Literal["train", "held-out", "all"] = "held-out"
    """Which images."""


@dataclass(kw_only=True)
class OnDevice:
    """Where a command computes that does not train."""

    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""


@dataclass(kw_only=True)
class VaryingLength:
    """How many codes a DQ-VAE spends on an image."""

    target_codes: int | None = None
    """DQ-VAE: codes for each image. Default: as many as its router gives."""
    target_error: float | None = None
    """DQ-VAE: as few codes for each image as bring its mean squared error (values in [-1, 1]) below this, or the most
    codes that it can have."""

    def targets(self, run: Path, kind: str) -> dict[str, Any]:
        """Those that were given, as arguments of a DQ-VAE's `encode`.

        Raises:
            RunError: some were, and the run is of another kind.
        """
        given = {"target_codes": self.target_codes, "target_error": self.target_error}
        given = {name: value for name, value in given.items() if value is not None}
        if given and kind != "dqvae":
            raise RunError(f"--target-codes, --target-error: need a DQ-VAE, {run} is a {kind}")
        return given

    def say_missed(self, figures: dict[str, Any]) -> None:
        """Tell where the error asked for could not be reached; figures: of `evaluate_reconstruction`."""
        count = figures.get("target_missed", 0)
        if count:
            least, most = figures["target_missed_least_mse"], figures["target_missed_most_mse"]
            print(
                f"vqfast: --target-error {self.target_error:g} cannot be reached for {count} of {figures['images']} "
                f"images: with all codes that they can have their errors are {least:.3g} to {most:.3g}",
                file=sys.stderr,
            )


def check_out(out: Path) -> None:
    """Make sure, before any work is done, that a folder for results can be made there; the disk is not touched.

    Raises:
        RunError: the path is taken, or lies below a file, or in a folder that cannot be written.
    """
    check_new(out)
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir():
        raise RunError(f"{out}: cannot be made: {above} is not a folder")
    if not os.access(above, os.W_OK):
        raise RunError(f"{out}: cannot be made: {above} may not be written")


def config_from(command: Any, config_class: type, **others: Any) -> Any:
    """A configuration: the command's options that have the names of its fields, and the others given here."""
    names = {f.name for f in fields(config_class)} & {f.name for f in fields(command)} - set(others)
    return config_class(**{name: getattr(command, name) for name in names}, **others)


def pick_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
