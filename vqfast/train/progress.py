"""How far a training is, and who works on it: RUN/state.json."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqfast.train.errors import RunError
from vqfast.train.runs import read_json, write_json
from vqfast.train.signals import Stopped

STATE_FILE = "state.json"


@dataclass(frozen=True)
class Progress:
    """state: running, finished, stopped (on request), failed (message says why) or killed.

    step: of the last checkpoint. steps: asked for.
    """

    state: str
    step: int
    steps: int
    message: str = ""


def read_progress(run: Path) -> Progress | None:
    """What a run's state.json says, or None where the run was no training or has not begun."""
    path = run / STATE_FILE
    if not path.is_file():
        return None
    found = read_json(path)
    state = found.get("state", "")
    if state == "running" and not _alive(found):
        state = "killed"
    return Progress(state, int(found.get("step", 0)), int(found.get("steps", 0)), str(found.get("message", "")))


def check_idle(run: Path) -> None:
    """Raises RunError where another process of this machine is training the run."""
    path = run / STATE_FILE
    if path.is_file():
        found = read_json(path)
        if found.get("state") == "running" and _alive(found) and found.get("pid") != os.getpid():
            raise RunError(f"{run}: process {found['pid']} is training it")


class RunState:
    """While entered, the run is known to be in training; on leaving it says how that ended.

    Args:
        run: the folder.
        start, steps: steps done, and to do.
        main: whether this process writes it.
    """

    def __init__(self, run: Path, start: int, steps: int, main: bool):
        self._run, self._step, self._steps, self._main = run, start, steps, main

    def at(self, step: int) -> None:
        """A checkpoint was made at this step."""
        self._step = step
        self._write("running")

    def __enter__(self) -> "RunState":
        self._write("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        if kind is None:
            self._write("finished")
        elif issubclass(kind, Stopped | KeyboardInterrupt):
            self._write("stopped")
        else:
            self._write("failed", " ".join(str(error).split()))

    def _write(self, state: str, message: str = "") -> None:
        if not self._main:
            return
        record: dict[str, Any] = {"state": state, "step": self._step, "steps": self._steps}
        if state == "running":
            record |= {"pid": os.getpid(), "host": socket.gethostname()}
        if message:
            record["message"] = message
        try:
            write_json(self._run / STATE_FILE, record)
        except OSError:
            # It is for people to look at: a full disk must not end the training over it.
            pass


def _alive(record: dict[str, Any]) -> bool:
    """Whether the process in a record runs; one on another machine is taken to."""
    if record.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(record.get("pid", 0)), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True
