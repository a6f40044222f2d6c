"""What a training promises that is killed, asked to stop, or finds the disk full or a checkpoint lost."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from vqfast.models.vqvae import VQVAE
from vqfast.train import CheckpointError, RunError, Stopped, TrainConfig, checkpoint, create_run, load_model, train
from vqfast.train.progress import read_progress

SCRIPT = Path(__file__).with_name("kill_points.py")
QUICK = dict(steps=8, batch_size=4, lr=1e-2, warmup=2, log_every=2, save_every=2, eval_every=4, device="cpu")
QUICK |= dict(tensorboard=False)

FEW = ["step:21", "file:3", "metrics:23"]
TWENTY = [f"step:{n}" for n in (1, 7, 13, 20, 21, 26, 33, 40)] + [f"file:{n}" for n in (1, 2, 8, 15)]
TWENTY += [f"disk:{n}" for n in (1, 8, 14, 20)] + ["keep:1", "keep:4", "metrics:5", "metrics:23"]
# With two parts the 41st turn is that of the model in the 21st step, the next that of the discriminator.
JUDGED = ["step:41", "step:42", "file:3", "disk:8", "metrics:23"]


def records(run):
    return [json.loads(line) | {"images_per_s": 0} for line in (run / "metrics.jsonl").read_text().splitlines()]


def equal(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path / "run", "vqvae", {}).path


@pytest.mark.parametrize(
    ("model", "points"),
    [("vqvae", FEW), pytest.param("vqvae", TWENTY, marks=pytest.mark.slow)]
    + [pytest.param(model, JUDGED, marks=pytest.mark.slow) for model in ("vqgan", "dqvae", "dqvae_entropy")],
)
def test_forty_steps_are_the_same_bits_with_a_kill_in_between(tmp_path, model, points):
    command = [sys.executable, SCRIPT, tmp_path, model, *points]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr
    expected = dict(np.load(tmp_path / "straight.npz"))
    for point in points:
        name = point.replace(":", "-")
        found = dict(np.load(tmp_path / f"{name}.npz"))
        for key, value in expected.items():
            assert np.array_equal(found[key], value), (point, key)
        assert records(tmp_path / name) == records(tmp_path / "straight"), point
        assert not list((tmp_path / name / "checkpoints").glob(".*")), "what the killed process left is gone"
        left = tmp_path / f"{name}-as-left"
        assert read_progress(left).state == "killed"


class StopsAt:
    """A model that is sent a signal at a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def __call__(self, config):
        model = VQVAE(config)
        training_step = model.training_step

        def signalled(batch, step):
            if step == self.step and model.training:
                signal.raise_signal(self.number)
            return training_step(batch, step)

        model.training_step = signalled
        return model


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_asked_to_stop_saves_and_goes_on_later(tmp_path, run, fresh_model, tiny_images, number):
    config = TrainConfig(**QUICK)
    expected = train(fresh_model(), tiny_images, config, create_run(tmp_path / "straight", "vqvae", {}).path)
    handler = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped after step 5 of 8; add --resume") as stop:
        train(fresh_model(StopsAt(number, 4)), tiny_images, config, run)
    assert stop.value.code == 0 and signal.getsignal(number) is handler
    assert read_progress(run).state == "stopped" and read_progress(run).step == 5
    assert equal(train(fresh_model(), tiny_images, config, run, resume=True), expected)
    assert read_progress(run).state == "finished"


def test_sigterm_ends_the_command_with_exit_code_0(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", images=rng.integers(0, 256, (20, 4, 4), dtype=np.uint8))
    command = (
        f"train vqvae --data {tmp_path}/images.npz --out {tmp_path}/run --channels 32 --mults 1 --num-res-blocks 1 "
        "--codebook-size 8 --code-dim 4 --steps 1000000 --batch-size 4 --log-every 1 --device cpu"
    )
    arguments = [sys.executable, "-m", "vqfast.cli", *command.split()]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "stopped after step" in said and "Traceback" not in said
    assert load_model(tmp_path / "run", "vqvae") is not None


def full(error, from_call):
    """save_file that works until the disk is full."""
    save_file, calls = checkpoint.save_file, [0]

    def save(tensors, path):
        calls[0] += 1
        if calls[0] in from_call:
            Path(path).write_bytes(b"as much as there was room for")
            raise error
        save_file(tensors, path)

    return save


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_survived_while_there_are_steps_to_take(
    run, fresh_model, tiny_images, monkeypatch, capsys, error
):
    monkeypatch.setattr(checkpoint, "save_file", full(error, from_call=[3]))
    train(fresh_model(), tiny_images, TrainConfig(**QUICK), run)
    said = capsys.readouterr().out
    assert "step-00000004: cannot be written: " in said and "No space left on device; training goes on" in said
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


def test_a_disk_that_stays_full_is_an_error_and_keeps_the_older_checkpoints(run, fresh_model, tiny_images, monkeypatch):
    error = OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", full(error, from_call=range(5, 100)))
    with pytest.raises(CheckpointError, match="step-00000008: cannot be written: No space left on device"):
        train(fresh_model(), tiny_images, TrainConfig(**QUICK), run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert load_model(run, "vqvae") is not None
    assert read_progress(run).state == "failed"


def truncate(file):
    file.write_bytes(file.read_bytes()[:-9])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, fresh_model, tiny_images, capsys, name, damage):
    config = TrainConfig(**QUICK)
    whole = create_run(tmp_path / "whole", "vqvae", {}).path
    expected = train(fresh_model(), tiny_images, config, whole)
    if damage is flip and name == "checkpoint.json":
        damage = lambda file: file.write_text(file.read_text().replace("{", "[", 1))
    damage(whole / "checkpoints" / "step-00000008" / name)
    assert equal(train(fresh_model(), tiny_images, config, whole, resume=True), expected)
    said = capsys.readouterr().out
    assert "step-00000008" in said and "going on from step-00000006 instead" in said


def test_without_a_good_checkpoint_nothing_is_started_over(run, fresh_model, tiny_images):
    train(fresh_model(), tiny_images, TrainConfig(**QUICK), run)
    for folder in (run / "checkpoints").iterdir():
        truncate(folder / "training.safetensors")
    with pytest.raises(RunError, match="step-00000008.*damaged.*; no other checkpoint to go on from"):
        train(fresh_model(), tiny_images, TrainConfig(**QUICK), run, resume=True)


def test_the_best_checkpoint_is_kept_beside_the_last_ones(run, fresh_model, tiny_images, tiny_held_out):
    class Worsens(VQVAE):
        def training_step(self, batch, step):
            scalars = super().training_step(batch, step)
            if not self.training:
                self.looks = getattr(self, "looks", 0) + 1
                return scalars | {"loss": torch.tensor(float(abs(self.looks - 2)))}
            return scalars

    config = TrainConfig(**QUICK | dict(eval_every=2, keep_last=1, batch_size=64))
    train(fresh_model(Worsens), tiny_images, config, run, held_out=tiny_held_out)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]
    best, last = (load_model(run, "vqvae", checkpoint=which).state_dict() for which in ("best", "last"))
    assert checkpoint.best_checkpoint(run).step == 4
    assert not all(torch.equal(best[name], last[name]) for name in best)


def test_a_run_in_training_is_not_trained_twice(run, fresh_model, tiny_images):
    train(fresh_model(), tiny_images, TrainConfig(**QUICK), run)
    shutil.copy(run / "state.json", run / "before.json")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        state = json.loads((run / "state.json").read_text())
        state |= {"state": "running", "pid": other.pid, "host": socket.gethostname()}
        (run / "state.json").write_text(json.dumps(state))
        with pytest.raises(RunError, match=f"process {other.pid} is training it"):
            train(fresh_model(), tiny_images, TrainConfig(**QUICK | dict(steps=10)), run, resume=True)
        other.communicate(b"\n")
    train(fresh_model(), tiny_images, TrainConfig(**QUICK | dict(steps=10)), run, resume=True)
