"""Slips of a first hour: each is refused in one line that names what was typed, before anything is written."""

import errno
import json

import numpy as np
import pytest
from safetensors import SafetensorError

from vqfast.cli import main
from vqfast.cli.words import several

NEW = "--image-size 8 --steps 2 --device cpu"
SMALL = "--image-size 8 --crop 8 --cell 4 --side 3"

REFUSED = [
    # Values that do not parse: in words, by the flag.
    ("sample {runs}/vqddm --grid 8", "--grid: expected INT INT, got 8"),
    ("sample {runs}/vqddm --top-k many", "--top-k: expected a whole number, got many"),
    ("reconstruct {runs}/dqvae --data {images} --target-error much", "--target-error: expected a number, got much"),
    ("train vqvae --data {images} --steps 2.5", "--steps: expected a whole number, got 2.5"),
    ("train vqvae --data {images} --lr fast", "--lr: expected a number, got fast"),
    ("train vqvae --data {images} --batch-size 0", "vqfast: --batch-size: expected at least 1, got 0"),
    ("train vqvae --data {images} --seed -1", "vqfast: --seed: expected at least 0, got -1"),
    # Networks that cannot be.
    (f"train vqvae --data {{images}} {NEW} --num-res-blocks 0", "num_res_blocks: expected at least 1, got 0"),
    (f"train vqvae --data {{images}} {NEW} --channels -32", "channels: expected at least 1, got -32"),
    (f"train vqvae --data {{images}} {NEW} --code-dim 0", "code_dim: expected at least 1, got 0"),
    (f"train vqvae --data {{images}} {NEW} --norm-groups 0", "norm_groups: expected at least 1, got 0"),
    (f"train vqvae --data {{images}} {NEW} --dropout 2", "dropout: expected a share of at least 0, below 1, got 2"),
    (f"train vqgan --data {{images}} {NEW} --z-channels 0", "z_channels: expected at least 1, got 0"),
    (f"train dqvae --data {{images}} {NEW} --shares 2", "shares: expected numbers of at least 0 that sum to"),
    (
        "train vqddm --vqvae {runs}/vqvae --data {images} --denoiser transformer --heads 0",
        "heads: expected at least 1, got 0",
    ),
    (
        "train vqddm --vqvae {runs}/vqvae --data {images} --denoiser transformer --depth 0",
        "depth: expected at least 1, got 0",
    ),
    ("train raster_gpt --vqvae {runs}/vqgan --data {images} --heads 0", "heads: expected at least 1, got 0"),
    # What would be of no use, or only found out after minutes.
    ("sample {runs}/vqddm --guidance nan", "--guidance: expected a number, got nan"),
    ("evaluate {runs}/vqvae --data {images} --top-k 5 -n 3", "--top-k, --n: {runs}/vqvae is of an autoencoder, which"),
    ("interpolate {runs}/vqddm --data {one} --split all", "expected at least 2 images (--split all), got 1"),
    ("refit {runs}/vqgan --data {images} --codebook-size 0", "--codebook-size: expected at least 1, got 0"),
    ("refit {runs}/vqgan --data {images} --iters 0", "--iters: expected at least 1, got 0"),
    ("demo --vqvae-steps 0", "--vqvae-steps: expected at least 1, got 0"),
    ("demo --seed -1", "--seed: expected at least 0, got -1"),
    (f"compare dqvae --data {{images}} {SMALL} --steps 0", "--steps: expected at least 1, got 0"),
    (f"compare dqvae --data {{images}} {SMALL} --batch-size 0", "--batch-size: expected at least 1, got 0"),
    (f"compare dqvae --data {{images}} {SMALL} --held-out 1", "--held-out: expected at least 2, got 1"),
    (f"compare dqvae --data {{images}} {SMALL} --lr -1", "--lr: expected a number above 0, got -1.0"),
    (f"compare dqvae --data {{images}} {SMALL} --budget-weight -1", "budget_weights: expected at least 0"),
]


@pytest.mark.parametrize(("command", "message"), REFUSED)
def test_a_slip_is_refused_before_anything_is_written(runs, images, tmp_path, refused, command, message):
    np.savez(tmp_path / "one.npz", images=np.zeros((1, 8, 8), np.uint8), labels=np.array(["cat"]))
    given = dict(runs=runs, images=images, one=tmp_path / "one.npz")
    assert message.format(**given) in refused(f"{command.format(**given)} --out {tmp_path}/out", tmp_path)


def test_a_run_is_called_by_the_right_article(tmp_path, refused):
    for kind, article in (("evaluate", "an"), ("sample", "a")):
        run = tmp_path / kind
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"format": 1, "kind": kind}))
        assert f"holds {article} {kind} run, expected a vqddm or" in refused(
            f"sample {run} --out {tmp_path}/o", tmp_path
        )
        said = refused(f"train vqvae --data digits --out {run}", tmp_path)
        assert f"already holds {article} {kind} run;" in said


def test_one_image_is_one_image():
    assert (several(1, "image"), several(2, "image"), several(0, "step")) == ("1 image", "2 images", "0 steps")


def test_a_full_disk_is_named_and_is_no_error_of_ours(runs, tmp_path, monkeypatch, refused):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("vqfast.train.hub.save_file", full)
    message = refused(f"share {runs}/vqvae --out {tmp_path}/shared")
    assert f"{tmp_path}/shared: cannot be written: " in message and "No space left on device" in message


def test_an_error_of_the_system_is_said_without_its_number(runs, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vqfast.cli.runs.write_run_report", full)
    assert main(f"report {runs}/vqvae --out {tmp_path}/page.html".split()) == 2
    assert capsys.readouterr().err == "vqfast: No space left on device (--debug shows where)\n"
