"""The autoregressive models on the command line: train on codes, sample, refuse what does not fit."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from vqfast.cli import main
from vqfast.models.dqvae import DQVAE, DQVAEConfig
from vqfast.models.vqvae import VQVAE, VQVAEConfig
from vqfast.train import create_run
from vqfast.train.checkpoint import save_checkpoint

TRAINING = "--steps 2 --batch-size 8 --device cpu"
TINY_GPT = f"--dim 16 --depth 1 --heads 2 {TRAINING}"
TINY_DQ = f"--dim 16 --position-depth 1 --content-depth 1 --heads 2 {TRAINING}"


def run(command: str) -> int:
    return main(command.split())


def save(folder, kind, model) -> None:
    """An autoencoder's run, untrained: what it draws is noise, but it draws."""
    create_run(folder, kind, {"model": asdict(model.config)})
    save_checkpoint(folder, 1, model, model.state_dict(), {}, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a run of each autoencoder, and a run of each model trained on their codes for two steps."""
    folder = tmp_path_factory.mktemp("autoregressive")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.array(["cat", "dog"])[np.arange(40) % 2])
    torch.manual_seed(0)
    shape = dict(image_size=8, in_channels=1, channels=32, num_res_blocks=1, codebook_size=16, code_dim=4)
    save(folder / "vqvae", "vqvae", VQVAE(VQVAEConfig(mults=(1, 1), **shape)))
    dynamic = DQVAEConfig(
        mults=(1, 1, 1), attention_resolutions=(), z_channels=32, router="random", disc_weight=0.0, **shape
    )
    save(folder / "dqvae", "dqvae", DQVAE(dynamic))
    data = f"--data {folder}/images.npz"
    assert run(f"train raster_gpt --vqvae {folder}/vqvae {data} --out {folder}/gpt {TINY_GPT}") == 0
    assert run(f"train dq_transformer --dqvae {folder}/dqvae {data} --out {folder}/dq {TINY_DQ}") == 0
    return folder


def test_training_leaves_a_run_that_stands_alone(folder):
    for name, kind, autoencoder in (("gpt", "raster_gpt", "vqvae"), ("dq", "dq_transformer", "dqvae")):
        described = json.loads((folder / name / "run.json").read_text())
        assert described["kind"] == kind and described["model"]["num_classes"] == 2
        assert described["model"]["grid"] == [4, 4] and described["model"]["codebook_size"] == 16
        assert (folder / name / autoencoder / "run.json").exists()
    assert described["model"]["num_grains"] == 2


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("gpt", "--top-k 4 --guidance 2"),
        ("dq", "--top-k 4 --position-top-k 2 --guidance 2"),
        ("dq", "--top-p 0.9 --derive-finest"),
    ],
)
def test_sample(folder, tmp_path, model, settings):
    assert run(f"sample {folder}/{model} -n 4 --labels dog {settings} --out {tmp_path}/a --device cpu") == 0
    drawn = np.load(tmp_path / "a" / "samples.npz")
    assert drawn["images"].shape == (4, 8, 8, 1) and drawn["labels"].tolist() == ["dog"] * 4
    assert drawn["codes"].shape == (4, 4, 4)
    assert ("grains" in drawn) == (model == "dq")
    if model == "dq":
        assert drawn["grains"].shape == (4, 2, 2)
    with Image.open(tmp_path / "a" / "samples.png") as image:
        image.verify()


def test_training_goes_on(folder, tmp_path):
    common = f"train raster_gpt --vqvae {folder}/vqvae --data {folder}/images.npz --out {tmp_path}/a"
    assert run(f"{common} {TINY_GPT}") == 0
    assert run(f"{common} {TINY_GPT.replace('--steps 2', '--steps 3')} --resume") == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 3


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sample {folder}/gpt --steps 3", "--steps: the raster_gpt in"),
        ("sample {folder}/gpt --derive-finest", "--derive-finest: the raster_gpt in"),
        ("sample {folder}/dq --top-p 2", "--top-p: expected a share"),
        ("sample {folder}/vqvae", "holds a vqvae run, expected a vqddm or raster_gpt or dq_transformer run"),
        ("inpaint {folder}/dq --data {folder}/images.npz", "expected a vqddm or raster_gpt run"),
        ("inpaint {folder}/gpt --data {folder}/images.npz --steps 3", "--steps: the raster_gpt in"),
        ("inpaint {folder}/gpt --data {folder}/images.npz --variations 0", "--variations: expected at least 1"),
        ("sample {folder}/gpt --decoding confidence", "--decoding: the raster_gpt in"),
        ("sample {folder}/gpt --grid 8 8", "--grid: the raster_gpt in"),
        ("interpolate {folder}/gpt --data {folder}/images.npz", "holds a raster_gpt run, expected a vqddm run"),
        ("train raster_gpt --vqvae {folder}/dqvae --data {folder}/images.npz", "holds a dqvae run, expected a vqvae"),
        (
            "train dq_transformer --dqvae {folder}/vqvae --data {folder}/images.npz",
            "holds a vqvae run, expected a dqvae",
        ),
        ("train raster_gpt --vqvae {folder}/vqvae --data {folder}/images.npz --dim 10", "dim: expected a multiple"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(folder, tmp_path, capsys, command, message):
    assert run(f"{command.format(folder=folder)} --out {tmp_path}/a --device cpu") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()
