"""`vqfast compare generation`: from the command to the table and the pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from vqfast.cli import main

TINY = (
    "--minutes 0.002 --seeds 2 --n 6 --held-out 4 --dim 48 --position-depth 1 --content-depth 1 --heads 2 "
    "--classifier-steps 2 --codebook-size 16 --batch-size 4 --resamples 20 --device cpu"
)
WAYS = ["DQ-Transformer", "DQ-Transformer, finest places derived", "raster transformer"]


@pytest.fixture(scope="module")
def compared(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    assert main(f"compare generation --data {images} --out {out} --dqvae-steps 1 {TINY}".split()) == 0
    return out


def test_it_leaves_figures_of_every_training(compared):
    found = json.loads((compared / "results.json").read_text())
    ours, raster = found["models"]["DQ-Transformer"], found["models"]["raster transformer"]
    assert raster["parameters"] == pytest.approx(ours["parameters"], rel=0.02)
    assert ours["config"]["grid"] == raster["config"]["grid"] == [8, 8]
    assert len(ours["steps"]) == len(raster["steps"]) == 2 and min(ours["steps"] + raster["steps"]) >= 1
    assert [row["model"] for row in found["samples"]] == WAYS
    for row in found["samples"]:
        assert len(row["frechet"]) == 2 and min(row["frechet"]) > 0 and min(row["ms_per_image"]) > 0
        assert all(0 <= share <= 1 for share in row["class_read"] + row["copied"])
    assert found["samples"][2]["tokens_per_image"] == [64, 64]
    assert all(16 + 4 <= tokens <= 64 + 4 for row in found["samples"][:2] for tokens in row["tokens_per_image"])
    assert 0 <= found["classifier_accuracy"] <= 1 and found["frechet_of_reconstructions"] > 0
    assert [claim["text"].split(" (")[0] for claim in found["claims"]] == [
        "samples: nearer to real images",
        "samples: show the class asked for more often",
        "samples: take less time an image",
    ]
    assert {claim["verdict"] for claim in found["claims"]} <= {"holds", "fails", "undecided"}


def test_it_leaves_a_table_and_pictures(compared):
    text = (compared / "results.md").read_text()
    assert all(f"| {way} | " in text for way in WAYS) and "Reconstructions of training images have" in text
    for name in ("samples", "grains"):
        with Image.open(compared / f"{name}.png") as picture:
            assert min(picture.size) > 100


def test_without_one_it_trains_a_dqvae(compared):
    described = json.loads((compared / "dqvae" / "run.json").read_text())
    assert described["kind"] == "dqvae"
    assert described["model"]["router"] == "entropy" and described["model"]["disc_weight"] == 0


def test_it_takes_a_trained_dqvae(images, runs, tmp_path):
    command = f"compare generation --data {images} --dqvae {runs}/dqvae --out {tmp_path}/a {TINY} --seeds 1"
    assert main(command.split()) == 0
    assert not (tmp_path / "a" / "dqvae").exists()
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    grid = found["models"]["raster transformer"]["config"]["grid"]
    assert found["samples"][2]["tokens_per_image"] == [grid[0] * grid[1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--minutes 0", "--minutes: expected a time above 0"),
        ("--seeds 0", "--seeds: expected at least 1, got 0"),
        ("--n 1", "--n: expected at least 2, got 1"),
        ("--batch-size 0", "--batch-size: expected at least 1, got 0"),
        ("--lr 0", "--lr: expected a number above 0"),
        ("--classifier-steps 0", "--classifier-steps: expected at least 1"),
        ("--dqvae-steps 0", "steps: expected at least 1, got 0"),
        ("--image-size 9", "image_size: expected a multiple of 2"),
        ("--dim 49", "dim: expected a multiple of"),
        ("--content-depth 0", "depth: expected at least one block"),
        ("--dqvae missing", "missing: no such"),
        ("--dqvae {runs}/vqvae", "holds a vqvae run, expected a dqvae"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(images, runs, refused, tmp_path, options, message):
    command = f"compare generation --data {images} --out {tmp_path}/a {TINY} {options.format(runs=runs)}"
    assert message in refused(command, tmp_path, quickly=runs)


def test_images_need_classes(refused, tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((40, 8, 8), dtype=np.uint8))
    line = refused(f"compare generation --data {tmp_path}/images.npz --out {tmp_path}/a {TINY}", tmp_path)
    assert "expected images with classes" in line
