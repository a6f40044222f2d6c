"""Checkpoints: safetensors weights with their configuration and checksums, made complete or not at all.

RUN/checkpoints/step-00000500/
  checkpoint.json         format, kind, step, model configuration, held-out figures, SHA-256 of each file beside it
  model.safetensors       the weights to use (the averaged ones, where training averages)
  training.safetensors    what else a resumed training needs
"""

import hashlib
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vqfast.models.autoencoder import Autoencoder
from vqfast.models.registry import AUTOENCODERS, build, kind_of
from vqfast.train.errors import CheckpointError, RunError
from vqfast.train.runs import FORMAT, Run, check_format, open_run, read_json, run_of, write_json

WEIGHTS, TRAINING, INDEX = "model.safetensors", "training.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files match their checksums."""

    path: Path
    kind: str
    step: int
    config: dict[str, Any]
    extra: dict[str, Any]


def not_written(path: Path, error: OSError | SafetensorError) -> CheckpointError:
    """What to raise where weights, or what goes with them, could not be written, as on a full disk."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return CheckpointError(f"{path}: cannot be written: {reason}")


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    weights: dict[str, Tensor],
    training: dict[str, Tensor],
    extra: dict[str, Any],
    *,
    held_out: dict[str, float] | None = None,
    keep_last: int = 2,
) -> Path:
    """Write a checkpoint, then drop the older ones but for the one with the lowest held-out loss.

    Args:
        run: folder of the run.
        step: training steps done.
        model: says kind and configuration.
        weights: state dict to use later.
        training: tensors that a resumed training needs.
        extra: plain values that it needs.
        held_out: figures of the weights, among them held_out/loss.
        keep_last: how many of the newest to keep.

    Returns:
        The checkpoint's folder, which appears under its name only when it is complete and on the disk.

    Raises:
        CheckpointError: it could not be written, for lack of space or otherwise.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}"
    beside = folder / f".{final.name}.{os.getpid()}"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file(_own(weights), beside / WEIGHTS)
        save_file(_own(training), beside / TRAINING)
        index = {
            "format": FORMAT,
            "kind": kind_of(model),
            "step": step,
            "config": asdict(model.config),
            "held_out": held_out or {},
            "extra": extra,
            "sha256": {name: sha256(beside / name) for name in (WEIGHTS, TRAINING)},
        }
        write_json(beside / INDEX, index)
        for path in (beside / WEIGHTS, beside / TRAINING, beside / INDEX, beside):
            _to_disk(path)
        if final.exists():
            final.rename(folder / f".{final.name}.old")
        beside.rename(final)
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise not_written(final, error) from error
    remove_unfinished(run)
    _keep(run, keep_last)
    return final


def saved_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def newest_checkpoint(run: Path, files: tuple[str, ...] = (WEIGHTS,)) -> Checkpoint:
    """The last checkpoint of a run, its files checked against their checksums.

    Raises:
        RunError: there is none, or it is not as it was written.
    """
    found = saved_checkpoints(run)
    if not found:
        raise RunError(f"{run}: holds no checkpoint yet")
    return read_checkpoint(found[-1], files)


def best_checkpoint(run: Path, files: tuple[str, ...] = (WEIGHTS,)) -> Checkpoint:
    """The checkpoint with the lowest held-out loss, checked; the newest where none was measured.

    Raises:
        RunError: as `newest_checkpoint`.
    """
    found = saved_checkpoints(run)
    best = min(reversed(found), key=_held_out_loss, default=None)
    return newest_checkpoint(run, files) if best is None else read_checkpoint(best, files)


def resumable_checkpoint(run: Path, kind: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint from which training can go on, or None where none was made yet.

    Args:
        run: folder of the run.
        kind: what it must hold.
        say: told of newer ones that are damaged and passed over.

    Raises:
        RunError: there are some, all of them damaged, or of another kind.
    """
    faults = []
    for path in reversed(saved_checkpoints(run)):
        try:
            checkpoint = read_checkpoint(path, (WEIGHTS, TRAINING))
        except RunError as error:
            faults.append(str(error))
            continue
        if checkpoint.kind != kind:
            raise RunError(f"{path}: holds a {checkpoint.kind}, expected a {kind}")
        for fault in faults:
            say(f"{fault}; going on from {path.name} instead")
        return checkpoint
    if faults:
        raise RunError(f"{faults[0]}; no other checkpoint to go on from")
    return None


def read_checkpoint(path: Path, files: tuple[str, ...]) -> Checkpoint:
    """A checkpoint, these files of it checked against their checksums.

    Raises:
        RunError: it is not as it was written, or by a newer version.
    """
    index = read_json(path / INDEX)
    check_format(index, path / INDEX)
    try:
        checkpoint = Checkpoint(path, index["kind"], index["step"], index["config"], index["extra"])
        sums = {name: index["sha256"][name] for name in files}
    except KeyError as error:
        raise RunError(f"{path / INDEX}: lacks {error}") from error
    except TypeError as error:
        raise RunError(f"{path / INDEX}: not a description of a checkpoint") from error
    for name, expected in sums.items():
        check_sum(path / name, expected)
    return checkpoint


def check_sum(file: Path, expected: str) -> None:
    """Raises RunError where a file is missing or has another SHA-256 than recorded."""
    if not file.is_file():
        raise RunError(f"{file.parent}: lacks {file.name}")
    if sha256(file) != expected:
        raise RunError(f"{file}: damaged (its SHA-256 is not the one recorded when it was written)")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises RunError where the file is no safetensors file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: not a readable safetensors file: {error}") from error


def load_model(
    run: Path | str,
    kind: str | None = None,
    device: torch.device | str = "cpu",
    checkpoint: Literal["last", "best"] = "last",
) -> nn.Module:
    """The model of a run, with the weights of a checkpoint, in eval mode.

    Args:
        run: folder of a training run.
        kind: what it must hold, such as "vqvae"; None for any.
        device: where to put it.
        checkpoint: "last", or "best": that with the lowest loss on held-out images.

    Raises:
        RunError: not such a run, or a checkpoint that is missing, damaged, or of another model.
    """
    return model_from(checkpoint_of(open_run(run, kind), checkpoint)).to(device)


def checkpoint_of(run: Run, which: Literal["last", "best"] = "last") -> Checkpoint:
    """The last checkpoint of a run, or that with the lowest loss on held-out images, with good weights.

    Raises:
        RunError: there is none, it is damaged, or of another model than the run.
    """
    found = (best_checkpoint if which == "best" else newest_checkpoint)(run.path)
    if found.kind != run.kind:
        raise RunError(f"{found.path}: holds the weights of a {found.kind}, expected a {run.kind}")
    return found


def model_from(checkpoint: Checkpoint) -> nn.Module:
    """The model of a checkpoint on the CPU, in eval mode.

    Raises:
        RunError: its weights and configuration do not fit.
    """
    try:
        model = build(checkpoint.kind, checkpoint.config)
        model.load_state_dict(read_tensors(checkpoint.path / WEIGHTS))
    except RunError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{checkpoint.path}: not the weights of its configuration: {reason}") from error
    return model.eval()


def load_autoencoder(run: Path | str, device: torch.device | str = "cpu") -> Autoencoder:
    """As `load_model`, of any kind that encodes images to a grid of codes."""
    found = open_run(run).kind
    if found not in AUTOENCODERS:
        raise RunError(f"{run}: holds {run_of(found)}, expected {run_of(*AUTOENCODERS)}")
    return load_model(run, found, device)


def remove_unfinished(run: Path) -> None:
    """Drop what writers that were killed left beside the checkpoints."""
    for left in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _keep(run: Path, last: int) -> None:
    saved = saved_checkpoints(run)
    best = min(reversed(saved), key=_held_out_loss)
    for old in saved[:-last]:
        if old != best or _held_out_loss(best) == math.inf:
            shutil.rmtree(old)


def _held_out_loss(path: Path) -> float:
    try:
        loss = read_json(path / INDEX)["held_out"]["held_out/loss"]
    except (RunError, KeyError, TypeError):
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the host, each with memory of its own: safetensors refuses views of one memory."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        own[name] = value.clone() if pointer in seen or value.untyped_storage().nbytes() != value.nbytes else value
        seen.add(pointer)
    return own


def _to_disk(path: Path) -> None:
    """Wait until a file or folder has reached the disk: a rename may otherwise get there before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
