"""The folder of a run: `run.json` says what kind of run it is, of what configuration, by which version."""

import json
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import vqfast
from vqfast.train.errors import RunError

RUN_FILE = "run.json"
FORMAT = 1  # of run.json, checkpoint.json and config.yaml: one more for each change that older versions cannot read


@dataclass(frozen=True)
class Run:
    """A run that is on disk.

    kind: what made it: vqvae, vqddm, sample, ...
    info: the rest of run.json; of a training run: "model", "training" and "data".
    """

    path: Path
    kind: str
    info: dict[str, Any]


def run_of(*kinds: str) -> str:
    """ "a vqvae run", "an evaluate or sample run"."""
    return f"{'an' if kinds[0][:1] in 'aeiou' else 'a'} {' or '.join(kinds)} run"


def check_new(out: Path | str) -> Path:
    """Make sure that nothing is in the way of a new run, without touching the disk.

    Raises:
        RunError: the path is a file, a run already, or a folder that holds something else.
    """
    out = Path(out)
    if not out.exists():
        return out
    if not out.is_dir():
        raise RunError(f"{out}: exists and is not a folder; choose another --out")
    if (out / RUN_FILE).exists():
        run = open_run(out)
        hint = (
            "add --resume to continue it, or choose another --out" if "training" in run.info else "choose another --out"
        )
        raise RunError(f"{out}: already holds {run_of(run.kind)}; {hint}")
    if any(out.iterdir()):
        raise RunError(f"{out}: exists, is not empty and is not a run; nothing was changed, choose another --out")
    return out


def create_run(out: Path | str, kind: str, info: dict[str, Any]) -> Run:
    """Make the folder and write its run.json.

    Raises:
        RunError: as `check_new`, or the folder cannot be made.
    """
    out = check_new(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out}: cannot be made: {error.strerror}") from error
    stamp = {
        "format": FORMAT,
        "version": vqfast.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(out / RUN_FILE, {"kind": kind} | stamp | info)
    return Run(out, kind, info)


def open_run(path: Path | str, kind: str | None = None) -> Run:
    """Read the run in a folder.

    Args:
        path: the folder.
        kind: what it must be, or None for any.

    Raises:
        RunError: nothing there, not a run, or one of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise RunError(f"{path}: no such run")
    file = path / RUN_FILE
    if not file.is_file():
        raise RunError(f"{path}: not a run (it holds no {RUN_FILE})")
    info = read_json(file)
    check_format(info, file)
    found = info.pop("kind", None)
    if not isinstance(found, str):
        raise RunError(f"{file}: not a description of a run")
    if kind is not None and found != kind:
        raise RunError(f"{path}: holds {run_of(found)}, expected {run_of(kind)}")
    return Run(path, found, info)


def check_format(described: dict[str, Any], file: Path) -> None:
    """Raises RunError where a file says that it was written in a newer format than this version reads."""
    found = described.get("format", FORMAT)
    if not isinstance(found, int) or found > FORMAT:
        raise RunError(
            f"{file}: written by a newer vqfast (format {found}, vqfast {vqfast.__version__} reads up to {FORMAT}); "
            "install a newer vqfast"
        )


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(value, indent=2) + "\n")
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Raises RunError where the file is not a JSON object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not readable: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: expected a JSON object")
    return value
