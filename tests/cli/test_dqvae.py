"""`vqfast train dqvae`, `reconstruct`, `convert dqvae` and `compare dqvae`: from the command to what is on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqfast.cli import main
from vqfast.cli.compare_dqvae import CompareDQVAE
from vqfast.models.dqvae import DQVAE
from vqfast.train import load_model

TINY = (
    "--channels 32 --mults 1 1 --num-res-blocks 1 --attention-resolutions 64 --codebook-size 16 --code-dim 8 "
    "--z-channels 32 --disc-channels 8 --disc-layers 1 --steps 3 --batch-size 4 --warmup 1 --device cpu"
)


def run(command):
    return main(command.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images with noise on one side, and a run of three steps on them."""
    folder = tmp_path_factory.mktemp("dqvae")
    rng = np.random.default_rng(0)
    images = np.full((30, 16, 16, 3), 128, dtype=np.uint8)
    images[:, :, 8:] = rng.integers(0, 256, (30, 16, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    command = f"train dqvae --data {folder}/images.npz --out {folder}/run --router entropy --entropy-per image {TINY}"
    assert run(command) == 0
    return folder


def test_training_leaves_a_run_of_both_players(folder):
    described = json.loads((folder / "run" / "run.json").read_text())
    assert described["kind"] == "dqvae" and described["model"]["shares"] == [0.5]
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    names = {name for record in records for name in record}
    assert {"codes", "commitment", "disc_weight", "usage"} <= names
    assert any("logits_real" in name for name in names), "the discriminator took its turns"
    assert isinstance(load_model(folder / "run", "dqvae"), DQVAE)


@pytest.mark.parametrize(
    ("options", "codes"), [("", (160, 160)), ("--target-codes 100", (100, 100)), ("--target-error 9", (64, 64))]
)
def test_reconstructing_shows_where_the_codes_go(folder, tmp_path, options, codes):
    assert run(f"reconstruct {folder}/run --data {folder}/images.npz --out {tmp_path}/out --split all {options}") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["codes_least"], metrics["codes_most"]) == codes and metrics["images"] == 30
    with Image.open(tmp_path / "out" / "reconstruction.png") as picture:
        assert min(picture.size) > 100


def test_an_error_that_cannot_be_reached_is_said(folder, tmp_path, capsys):
    images = f"--data {folder}/images.npz --split all --device cpu"
    model = load_model(folder / "run", "dqvae")
    with np.load(folder / "images.npz") as data:
        pixels = torch.from_numpy(data["images"]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        finest = model.reconstruct(pixels, target_codes=256).clamp(-1, 1)
    errors = (finest - pixels).square().mean(dim=(1, 2, 3)).sort().values
    target = (errors[9] + errors[10]).item() / 2
    for command in ("reconstruct", "evaluate"):
        capsys.readouterr()
        assert run(f"{command} {folder}/run {images} --target-error {target} --out {tmp_path}/{command}") == 0
        said = capsys.readouterr().err.splitlines()
        assert said[-1] == (
            f"vqfast: --target-error {target:g} cannot be reached for 20 of 30 images: with all codes that they can "
            f"have their errors are {errors[10]:.3g} to {errors[-1]:.3g}"
        )
        metrics = json.loads((tmp_path / command / "metrics.json").read_text())
        assert metrics["target_missed"] == 20 and metrics["codes_most"] == 256
    assert run(f"reconstruct {folder}/run {images} --target-error 9 --out {tmp_path}/easy") == 0
    assert "target-error" not in capsys.readouterr().err


def test_what_does_not_fit_is_one_line(folder, tmp_path, capsys):
    out = f"--data {folder}/images.npz --out {tmp_path}/out"
    assert run(f"reconstruct {folder}/run {out} --target-codes 10") == 2
    assert "target_codes: expected from 64 (all coarse) to 256 (all fine), got 10" in capsys.readouterr().err
    assert run(f"train dqvae {out} --shares 0.5 0.5 {TINY}") == 2
    assert "shares: expected one for each of 1 finer grains" in capsys.readouterr().err
    assert run(f"compare dqvae {out} --image-size 16 --crop 16 --cell 4 --side 6") == 2
    assert "side: expected one of [5, 7], whose square two grains can reach, got 6" in capsys.readouterr().err
    assert run(f"compare dqvae {out} --image-size 16 --crop 16 --cell 3") == 2
    assert "cell: expected a power of two above 1 that divides the crop of 16, got 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_released_checkpoint_gives_what_it_gave_there(golden, tmp_path, capsys):
    g = golden("dqvae_dual_small")
    state = {name.removeprefix("sd/"): value for name, value in g.items() if name.startswith("sd/")}
    torch.save({"state_dict": state, "epoch": 50}, tmp_path / "last.ckpt")
    assert run(f"convert dqvae {tmp_path}/last.ckpt --out {tmp_path}/run") == 0
    assert "a DQ-VAE of 48 codes, 16 to 64 of them for 64 pixels" in capsys.readouterr().out
    model = load_model(tmp_path / "run", "dqvae")
    with torch.no_grad():
        torch.testing.assert_close(model.reconstruct(g["image"]), g["recon"], rtol=0, atol=1e-4)
    torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / "other.ckpt")
    assert run(f"convert dqvae {tmp_path}/other.ckpt --out {tmp_path}/other") == 2
    assert "quantize.codebook.weight is missing" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [32, 128])
def test_compared_networks_keep_what_is_as_bright_all_over(channels):
    config = CompareDQVAE(data="", out=Path(), channels=channels).networks(in_channels=3)
    with torch.device("meta"):
        norms = [module for module in DQVAE(config).modules() if isinstance(module, torch.nn.GroupNorm)]
    # In the published networks as well: a group of one channel would lose its mean.
    assert norms and min(norm.num_channels // norm.num_groups for norm in norms) >= 4


def test_comparing_writes_figures_and_pictures(folder, tmp_path):
    command = f"compare dqvae --data {folder}/images.npz --out {tmp_path}/out --image-size 16 --crop 16 --cell 4"
    assert run(f"{command} --steps 2 --batch-size 2 --codebook-size 16 --held-out 4 --side 7 --device cpu") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [row["name"] for row in found["results"]]
    assert names == [
        "fixed, 4 x 4",
        "fixed, 7 x 7",
        "fixed, 8 x 8",
        "entropy router",
        "feature router",
        "random grains",
    ]
    assert {row["codes"] for row in found["results"]} == {16, 49, 64}
    assert len(found["claims"]) == 4
    assert {claim["verdict"] for claim in found["claims"]} <= {"holds", "fails", "undecided"}
    assert "| entropy router | 49 |" in (tmp_path / "out" / "results.md").read_text()
    for name in ("curve", "grains"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert min(picture.size) > 100
