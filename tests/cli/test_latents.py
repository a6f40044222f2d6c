"""What the codes of a training promise: encoded once, by one process, and anew when what they are of changes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vqfast.cli import main
from vqfast.cli.encoding import encode
from vqfast.cli.latents import latents
from vqfast.data import open_dataset
from vqfast.models.autoencoder import Autoencoder
from vqfast.train import TrainConfig, load_autoencoder
from vqfast.train.checkpoint import WEIGHTS, newest_checkpoint

GPT = "--dim 16 --depth 1 --heads 2 --batch-size 8 --device cpu --no-tensorboard --eval-every 0"
CONFIG = TrainConfig(device="cpu")


@pytest.fixture
def encoded(monkeypatch):
    """How many images were encoded, batch by batch."""
    counts, whole = [], Autoencoder.encode

    def encode(self, images):
        counts.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(Autoencoder, "encode", encode)
    return counts


@pytest.fixture
def stage(trained, tmp_path):
    """Arguments of `latents` in a single process."""
    data = open_dataset(trained / "images.npz")
    weights = newest_checkpoint(trained / "vqvae").path
    alone = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    command = SimpleNamespace(out=tmp_path / "run", training=CONFIG)
    return [command, load_autoencoder(trained / "vqvae"), weights, data, alone]


def test_a_resumed_training_encodes_nothing(trained, tmp_path, encoded):
    command = f"train raster_gpt --vqvae {trained}/vqvae --data {trained}/images.npz --out {tmp_path}/run {GPT}"
    assert main(f"{command} --steps 2".split()) == 0
    assert sum(encoded) == 40, "every image once, the held-out ones too"
    assert main(f"{command} --steps 4 --resume".split()) == 0
    assert sum(encoded) == 40
    names = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "run" / "latents").iterdir())
    assert names == ["held-out", "train"]


def test_they_are_the_codes_of_the_images(stage):
    codes, held_out = latents(*stage)
    _, autoencoder, _, data, _ = stage
    for found, split in ((codes, "train"), (held_out, "held-out")):
        expected = encode(autoencoder, data, split)
        assert np.array_equal(found[np.arange(len(found))]["codes"], expected) and len(found) == len(expected)


def test_another_checkpoint_or_other_images_are_encoded_anew(stage, encoded, tmp_path):
    latents(*stage)
    stage[2] = tmp_path / "weights"
    stage[2].mkdir()
    (stage[2] / WEIGHTS).write_bytes(b"others")
    latents(*stage)
    assert sum(encoded) == 80
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "others.npz", images=rng.integers(0, 256, (40, 8, 8), dtype=np.uint8))
    stage[3] = open_dataset(tmp_path / "others.npz")
    latents(*stage)
    assert sum(encoded) == 120
    assert len(list((tmp_path / "run" / "latents").iterdir())) == 2, "the old ones are removed"


def test_other_processes_wait_for_the_main_one(stage, encoded):
    def main_one():
        assert not encoded, "nothing is encoded before"
        latents(*main)

    main = list(stage)
    stage[-1] = SimpleNamespace(is_main_process=False, wait_for_everyone=main_one)
    codes, _ = latents(*stage)
    assert sum(encoded) == 40 and len(codes) == 35


def test_workers_read_the_images(stage):
    expected = latents(*stage)[0][np.arange(35)]["codes"]
    stage[0] = SimpleNamespace(out=Path(f"{stage[0].out}-2"), training=TrainConfig(device="cpu", workers=1))
    assert np.array_equal(latents(*stage)[0][np.arange(35)]["codes"], expected)


def test_labels_come_with_the_codes(stage, trained, tmp_path):
    images = np.load(trained / "images.npz")["images"]
    np.savez(tmp_path / "labelled.npz", images=images, labels=np.arange(40) % 3)
    data = stage[3] = open_dataset(tmp_path / "labelled.npz")
    batch = latents(*stage)[0][np.array([4, 0])]
    assert batch["label"].tolist() == data.labels[data.indices("train")[[4, 0]]].tolist()
    assert str(batch["label"].dtype) == "torch.int64"
