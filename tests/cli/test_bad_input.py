"""What every command promises of wrong input: exit code 2, one clear line, nothing changed on the disk."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

# Each takes a run of a VQ-VAE, {run}, and images, {images}; {out} is not there yet.
COMMANDS = {
    "reconstruct": "reconstruct {run} --data {images} --out {out}",
    "train vqddm": "train vqddm --vqvae {run} --data {images} --out {out}",
    "share": "share {run} --out {out}",
    "train --resume": "train vqvae --data {images} --out {run} --resume {tiny}",
}
OTHERS = {
    "sample": "sample {run} --out {out}",
    "inpaint": "inpaint {run} --data {images} --out {out}",
    "report": "report {run}",
}
TINY = (
    "--channels 32 --mults 1 1 --num-res-blocks 1 --codebook-size 16 --code-dim 4 --steps 6 --batch-size 8 "
    "--save-every 2 --eval-every 2 --log-every 1 --device cpu --no-tensorboard"
)


@pytest.fixture
def line(trained, tmp_path, refused):
    """Runs a command against a run and gives the line it is refused with."""

    def run(command, path, images=None):
        images = images or trained / "images.npz"
        words = (COMMANDS | OTHERS)[command].format(run=path, images=images, out=tmp_path / "out", tiny=TINY)
        return refused(words, tmp_path, trained)

    return run


@pytest.fixture
def copy(trained, tmp_path):
    """A run of one's own to damage."""
    return shutil.copytree(trained / "vqvae", tmp_path / "vqvae")


def weights(run):
    return [path / "model.safetensors" for path in sorted((run / "checkpoints").iterdir())]


@pytest.mark.parametrize("command", COMMANDS | OTHERS)
def test_a_wrong_path(line, tmp_path, command):
    assert f"{tmp_path}/nowhere: no such run" in line(command, tmp_path / "nowhere")


@pytest.mark.parametrize("command", COMMANDS | OTHERS)
def test_an_empty_folder(line, tmp_path, command):
    (tmp_path / "empty").mkdir()
    assert "empty: not a run (it holds no run.json)" in line(command, tmp_path / "empty")


@pytest.mark.parametrize("command", COMMANDS | OTHERS)
def test_a_run_of_another_kind(line, copy, command):
    described = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(described | {"kind": "demo"}))
    (copy / "metrics.jsonl").unlink()
    message = line(command, copy)
    assert (
        "demo" in message
        and ("expected a" in message or "holds the weights of a vqvae" in message)
        or ("holds no metrics yet (it is a demo run)" in message)
    )


@pytest.mark.parametrize("command", COMMANDS | OTHERS)
def test_a_run_of_a_newer_version(line, copy, command):
    described = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(described | {"format": 99}))
    assert "written by a newer vqfast (format 99" in line(command, copy)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_of_a_newer_version(line, copy, command):
    for file in weights(copy):
        index = file.with_name("checkpoint.json")
        index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 99}))
    assert "written by a newer vqfast (format 99" in line(command, copy)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_with_a_flipped_byte(line, copy, command):
    for file in weights(copy):
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 1
        file.write_bytes(data)
    assert "damaged (its SHA-256 is not the one recorded" in line(command, copy)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_cut_at_any_of_twenty_points(line, copy, command):
    whole = {file: file.read_bytes() for file in weights(copy)}
    for point in range(20):
        for file, data in whole.items():
            file.write_bytes(data[: len(data) * point // 20])
        assert "damaged (its SHA-256 is not the one recorded" in line(command, copy), point


@pytest.mark.parametrize("command", ["reconstruct", "train vqddm"])
def test_images_of_several_sizes(trained, tmp_path, line, command):
    # With a size of their own asked for they are fitted; a VQ-VAE asks for its own, so only training one can fail.
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    assert "broken image broken.png" in line(command, trained / "vqvae", tmp_path / "images")


def test_training_images_of_several_sizes(tmp_path, refused):
    (tmp_path / "images").mkdir()
    for name, size in (("a", (8, 8)), ("b", (8, 9))):
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "images" / f"{name}.png")
    said = refused(f"train vqvae --data {tmp_path}/images --out {tmp_path}/out", tmp_path)
    assert "images of different sizes (a.png is 8x8, b.png is 9x8 pixels): choose one with --image-size" in said


def test_runs_of_nothing(tmp_path, refused):
    assert "nowhere: no such folder" in refused(f"runs {tmp_path}/nowhere", tmp_path)
    assert "holds no runs" in refused(f"runs {tmp_path}", tmp_path)
