"""Random parts and mirror images on the command line: what training sees, what the run says, what is refused."""

import json

import numpy as np
import pytest

from vqfast.cli import main, training
from vqfast.train import load_model

TINY = (
    "--channels 32 --mults 1 1 --num-res-blocks 1 --codebook-size 16 --code-dim 4 --batch-size 4 --save-every 2 "
    "--eval-every 2 --device cpu --no-tensorboard --steps 2"
)
MORE = {
    "vqvae": "",
    "vqgan": "--z-channels 32 --disc-channels 8 --disc-layers 1",
    "dqvae": "--z-channels 32 --disc-weight 0 --attention-resolutions 64",
}


@pytest.fixture
def images(tmp_path):
    """Eight columns of one value each: a part shows where it was cut, and whether it is mirrored."""
    columns = np.arange(12, dtype=np.uint8) * 20
    images = np.broadcast_to(columns, (24, 12, 12)).copy()
    images[:, 0, 0] = np.arange(24)  # no two the same: some are held out
    np.savez(tmp_path / "images.npz", images=images)
    return tmp_path / "images.npz"


@pytest.fixture
def seen(monkeypatch):
    """The training and the held-out images that the trainer is given."""
    found, train = [], training.train

    def spy(model, dataset, *rest, held_out=None, **options):
        found.append((dataset, held_out))
        return train(model, dataset, *rest, held_out=held_out, **options)

    monkeypatch.setattr(training, "train", spy)
    return found


@pytest.mark.parametrize("kind", MORE)
def test_training_sees_random_parts_and_evaluation_the_middle(images, seen, tmp_path, kind):
    options = f"--image-size 8 --random-crop-from 12 --flip {TINY} {MORE[kind]}"
    assert main(f"train {kind} --data {images} --out {tmp_path}/run {options}".split()) == 0
    assert load_model(tmp_path / "run", kind).config.image_size == 8
    (dataset, held_out), visits = seen[0], np.arange(200)
    parts = np.rint((dataset[visits]["image"].numpy()[:, 0, 4] + 1) * 127.5 / 20)  # (200, 8) columns
    assert parts.shape == (200, 8)
    mirrored = parts[:, 0] > parts[:, 1]
    assert 0.3 < mirrored.mean() < 0.7 and set(parts.min(1)) == {0, 1, 2, 3, 4}
    middle = np.rint((held_out[np.array([0])]["image"].numpy()[0, 0, 4] + 1) * 127.5 / 20)
    assert middle.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["augmentation"] == {"random_crop": 8, "flip": True} and described["data"]["image_size"] == 12


def test_without_them_images_are_as_they_are(images, seen, tmp_path):
    assert main(f"train vqvae --data {images} --out {tmp_path}/run {TINY}".split()) == 0
    dataset, _ = seen[0]
    assert dataset[np.array([0])]["image"].shape == (1, 1, 12, 12)
    assert np.array_equal(dataset[np.array([3])]["image"], dataset[np.array([3 + len(dataset)])]["image"])


def test_a_resumed_run_keeps_its_augmentation(images, tmp_path, capsys):
    command = f"train vqvae --data {images} --out {tmp_path}/run {TINY}"
    assert main(f"{command} --flip".split()) == 0
    assert main(f"{command} --resume".split()) == 2
    assert "was started with augmentation flip = True, now it is None" in capsys.readouterr().err
    assert main(f"{command} --flip --steps 3 --resume".split()) == 0


@pytest.mark.parametrize("options", ["--random-crop-from 12", "--random-crop-from 8 --image-size 12"])
def test_a_part_larger_than_the_image_is_refused(images, tmp_path, refused, options):
    message = refused(f"train vqvae --data {images} --out {tmp_path}/run {options}", tmp_path)
    assert "expected an --image-size of at most as many pixels" in message
