"""`vqfast compare vqddm`: from the command to the table and the pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from vqfast.cli import main

TINY = (
    "--minutes 0.002 --seeds 2 --n 6 --held-out 4 --steps 2 1 --timesteps 2 --dim 48 --depth 1 --heads 2 "
    "--classifier-steps 2 --codebook-size 16 --batch-size 4 --resamples 20 --device cpu"
)


@pytest.fixture(scope="module")
def compared(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    assert main(f"compare vqddm --data {images} --out {out} --vqvae-steps 1 {TINY}".split()) == 0
    return out


def test_it_leaves_figures_of_every_training(compared):
    found = json.loads((compared / "results.json").read_text())
    ours, raster = found["models"]["VQ-DDM"], found["models"]["raster transformer"]
    assert raster["parameters"] == pytest.approx(ours["parameters"], rel=0.02)
    assert len(ours["steps"]) == len(raster["bits_per_code"]) == 2 and min(ours["steps"] + raster["steps"]) >= 1
    assert [row["model"] for row in found["samples"]] == ["VQ-DDM, 2 steps", "VQ-DDM, 1 steps", "raster transformer"]
    for row in found["samples"]:
        assert len(row["frechet"]) == 2 and min(row["frechet"]) > 0 and min(row["ms_per_image"]) > 0
    assert [(row["mask"], row["model"]) for row in found["inpainting"]] == [
        (mask, model) for mask in ("centre", "random") for model in ("VQ-DDM", "raster transformer", "true codes")
    ]
    assert len(found["claims"]) == 9
    assert {claim["verdict"] for claim in found["claims"]} <= {"holds", "fails", "undecided"}


def test_it_leaves_a_table_and_pictures(compared):
    text = (compared / "results.md").read_text()
    assert "| centre | raster transformer | " in text and "cannot see what is given further down" in text
    for name in ("samples", "inpainting_centre", "inpainting_random"):
        with Image.open(compared / f"{name}.png") as picture:
            assert min(picture.size) > 100
    assert json.loads((compared / "vqvae" / "run.json").read_text())["kind"] == "vqvae"


def test_it_takes_a_trained_autoencoder(compared, images, tmp_path):
    command = f"compare vqddm --data {images} --vqvae {compared}/vqvae --out {tmp_path}/a {TINY} --seeds 1 --told"
    assert main(command.split()) == 0
    assert not (tmp_path / "a" / "vqvae").exists()
    assert json.loads((tmp_path / "a" / "run.json").read_text())["settings"]["told"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--minutes 0", "--minutes: expected a time above 0"),
        ("--steps 3", "--steps: expected numbers in 1..2 (--timesteps), got (3,)"),
        ("--n 1", "--n: expected at least 2, got 1"),
        ("--batch-size 0", "--batch-size: expected at least 1, got 0"),
        ("--vqvae-steps 0", "steps: expected at least 1, got 0"),
        ("--image-size 9", "image_size: expected a multiple of 2"),
        ("--dim 50", "dim: expected a multiple of"),
        ("--vqvae missing", "missing: no such"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(images, refused, tmp_path, options, message):
    assert message in refused(f"compare vqddm --data {images} --out {tmp_path}/a {TINY} {options}", tmp_path)


def test_images_need_classes(refused, tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((40, 8, 8), dtype=np.uint8))
    line = refused(f"compare vqddm --data {tmp_path}/images.npz --out {tmp_path}/a {TINY}", tmp_path)
    assert "expected images with classes" in line
