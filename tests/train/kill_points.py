"""Trainings killed at chosen moments and resumed; started by test_interruptions.py.

    kill_points.py FOLDER NAME EVENT:N ...

trains the model of this name in tiny_training.py. For each point a child of this process trains in a run of its own
until the Nth EVENT, where SIGKILL ends it; another child resumes, and leaves its weights in FOLDER/EVENT-N.npz. Forks,
because starting afresh takes seconds.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # every optimiser imports it, which takes longer than a tiny training
from tiny_training import new_run, train_tiny

from vqfast.train import checkpoint, observers
from vqfast.train.feed import Feed

SETTINGS = dict(steps=40, save_every=5, ema_decay=0.9, threads=1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(count: int):
    """True the count-th time it is asked."""
    left = [count]

    def reached() -> bool:
        left[0] -= 1
        return left[0] == 0

    return reached


def arm(event: str, count: int) -> None:
    """Let this process die at the count-th event."""
    reached = at(count)
    if event == "step":  # before a part's turn in a training step
        noise_seed = Feed.noise_seed
        Feed.noise_seed = lambda *arguments: die() if reached() else noise_seed(*arguments)
    elif event == "file":  # in the middle of writing tensors
        save_file = checkpoint.save_file

        def half(tensors, path):
            save_file(tensors, path)
            if reached():
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        checkpoint.save_file = half
    elif event == "disk":  # between the files of a checkpoint, or before it gets its name
        to_disk = checkpoint._to_disk
        checkpoint._to_disk = lambda path: die() if reached() else to_disk(path)
    elif event == "keep":  # after a checkpoint got its name, before old ones go
        keep = checkpoint._keep
        checkpoint._keep = lambda *arguments: die() if reached() else keep(*arguments)
    elif event == "metrics":  # in the middle of a line
        scalars = observers.MetricsFile.scalars

        def half_a_line(self, step, values):
            if reached():
                with self._path.open("a") as file:
                    file.write(json.dumps({"step": step} | values)[:20])
                die()
            scalars(self, step, values)

        observers.MetricsFile.scalars = half_a_line
    else:
        raise ValueError(event)


def in_child(work) -> int:
    """Do the work in a child and return how it ended: 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train_and_keep(model: str, folder: Path, name: str, **changes) -> None:
    settings = SETTINGS | changes
    torch.set_num_threads(settings.pop("threads"))
    state = train_tiny(model, folder / name, **settings).state_dict()
    np.savez(folder / f"{name}.npz", **{key: value.numpy() for key, value in state.items()})


def main() -> None:
    folder, model = Path(sys.argv[1]), sys.argv[2]
    new_run(model, folder / "straight")
    assert in_child(lambda: train_and_keep(model, folder, "straight")) == 0
    for point in sys.argv[3:]:
        event, count = point.split(":")
        name = f"{event}-{count}"
        new_run(model, folder / name)

        def killed(event=event, count=count, name=name):
            arm(event, int(count))
            train_and_keep(model, folder, name)

        assert in_child(killed) == -signal.SIGKILL, f"{point} was never reached"
        shutil.copytree(folder / name, folder / f"{name}-as-left")
        assert in_child(lambda name=name: train_and_keep(model, folder, name, resume=True)) == 0


main()
