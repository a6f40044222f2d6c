"""What people look at, and what happens where it cannot be written."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vqfast.train import TrainConfig, create_run, train
from vqfast.train.observers import MetricsFile, Observer, Observers

QUICK = dict(steps=8, batch_size=4, lr=1e-2, warmup=2, log_every=2, save_every=4, eval_every=4, device="cpu")


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path / "run", "vqvae", {}).path


def test_pictures_scalars_and_histograms_are_there(run, fresh_model, tiny_images, tiny_held_out, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(fresh_model(), tiny_images, TrainConfig(**QUICK), run, held_out=tiny_held_out)
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["00000004.png", "00000008.png"]
    with Image.open(run / "pictures" / "00000008.png") as image:
        assert np.asarray(image).std() > 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"loss", "usage", "held_out/loss", "images_per_s", "lr"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    assert set(tags["images"]) == {"image", "reconstruction"} and tags["histograms"] == ["codebook"]
    bar = capsys.readouterr().err
    assert "loss " in bar and "images/s" in bar and "codes used" in bar


def test_own_pictures_take_the_place_of_the_models(run, fresh_model, tiny_images, tiny_held_out):
    asked = []

    def pictures(model, batch):
        asked.append((model.training, torch.is_grad_enabled(), len(batch["image"])))
        return {"drawn": torch.zeros(2, 1, 4, 4)}

    config = TrainConfig(**QUICK | dict(tensorboard=False))
    train(fresh_model(), tiny_images, config, run, held_out=tiny_held_out, pictures=pictures)
    assert asked == [(False, False, len(tiny_held_out))] * 2


def test_an_observer_that_cannot_write_is_left_out(run, capsys):
    class Full(Observer):
        told = 0

        def scalars(self, step, values):
            self.told += 1
            raise OSError(28, "No space left on device")

    full = Full()
    observers = Observers([full, MetricsFile(run)])
    for step in (1, 2):
        observers.scalars(step, {"loss": 1.0})
    assert full.told == 1
    assert "Full: cannot write ([Errno 28] No space left on device); training goes on" in capsys.readouterr().out
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
