"""Checkpoints: safetensors weights with their configuration and checksums, made complete or not at all.

RUN/checkpoints/step-00000500/
  checkpoint.json         kind, step, model configuration, SHA-256 of each file beside it
  model.safetensors       the weights to use (the averaged ones, where training averages)
  training.safetensors    what else a resumed training needs
"""

import hashlib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vqfast.models.vqddm import VQDDM, VQDDMConfig
from vqfast.models.vqvae import VQVAE, VQVAEConfig
from vqfast.train.errors import RunError
from vqfast.train.runs import open_run, read_json, write_json

MODELS = {"vqvae": (VQVAE, VQVAEConfig), "vqddm": (VQDDM, VQDDMConfig)}

WEIGHTS, TRAINING, INDEX = "model.safetensors", "training.safetensors", "checkpoint.json"
KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files match their checksums."""

    path: Path
    kind: str
    step: int
    config: dict[str, Any]
    extra: dict[str, Any]


def kind_of(model: nn.Module) -> str:
    """The name under which a model's runs and checkpoints go."""
    for kind, (model_class, _) in MODELS.items():
        if isinstance(model, model_class):
            return kind
    raise TypeError(f"model: expected one of {', '.join(MODELS)}, got {type(model).__name__}")


def save_checkpoint(run: Path, step: int, model: nn.Module, training: dict[str, Tensor], extra: dict[str, Any]) -> Path:
    """Write a checkpoint and drop all but the two newest.

    Args:
        run: folder of the run.
        step: training steps done.
        model: holds the weights to use later.
        training: tensors that a resumed training needs.
        extra: plain values that it needs.

    Returns:
        The checkpoint's folder, which appears under its name only when it is complete.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}"
    beside = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    # A tensor may be a view of another's memory, which safetensors refuses.
    own = lambda tensors: {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(own(model.state_dict()), beside / WEIGHTS)
    save_file(own(training), beside / TRAINING)
    index = {
        "kind": kind_of(model),
        "step": step,
        "config": asdict(model.config),
        "extra": extra,
        "sha256": {name: _sha256(beside / name) for name in (WEIGHTS, TRAINING)},
    }
    write_json(beside / INDEX, index)
    if final.exists():
        shutil.rmtree(final)
    beside.rename(final)
    for old in saved_checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)
    return final


def newest_checkpoint(run: Path, files: tuple[str, ...] = (WEIGHTS,)) -> Checkpoint:
    """The last checkpoint of a run, its files checked against their checksums.

    Raises:
        RunError: there is none, or it is not as it was written.
    """
    found = saved_checkpoints(run)
    if not found:
        raise RunError(f"{run}: holds no checkpoint yet")
    path = found[-1]
    index = read_json(path / INDEX)
    try:
        checkpoint = Checkpoint(path, index["kind"], index["step"], index["config"], index["extra"])
        sums = {name: index["sha256"][name] for name in files}
    except KeyError as error:
        raise RunError(f"{path / INDEX}: lacks {error}") from error
    for name, expected in sums.items():
        if not (path / name).is_file():
            raise RunError(f"{path}: lacks {name}")
        if _sha256(path / name) != expected:
            raise RunError(f"{path / name}: damaged (its SHA-256 is not the one recorded when it was written)")
    return checkpoint


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises RunError where the file is no safetensors file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: not a readable safetensors file: {error}") from error


def load_model(run: Path | str, kind: str, device: torch.device | str = "cpu") -> nn.Module:
    """The model of a run, with the weights of its last checkpoint, in eval mode.

    Args:
        run: folder of a training run.
        kind: what it must hold: "vqvae" or "vqddm".
        device: where to put it.

    Raises:
        RunError: not such a run, or a checkpoint that is missing, damaged, or of another model.
    """
    path = open_run(run, kind).path
    checkpoint = newest_checkpoint(path)
    if checkpoint.kind != kind:
        raise RunError(f"{checkpoint.path}: holds the weights of a {checkpoint.kind}, expected a {kind}")
    model_class, config_class = MODELS[kind]
    try:
        model = model_class(config_class(**checkpoint.config))
        model.load_state_dict(read_tensors(checkpoint.path / WEIGHTS))
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{checkpoint.path}: not the weights of its configuration: {reason}") from error
    return model.to(device).eval()


def saved_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
