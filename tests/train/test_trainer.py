"""What the trainer promises: it learns, logs, resumes to the same bits, and stops where the loss breaks."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from vqfast.models.vqvae import VQVAE
from vqfast.train import RunError, TrainConfig, create_run, load_model, train
from vqfast.train.config import learning_rate

QUICK = dict(steps=8, batch_size=4, lr=1e-2, warmup=2, log_every=2, save_every=4, eval_every=4, device="cpu")


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path / "run", "vqvae", {}).path


def test_a_training_leaves_weights_and_metrics(run, fresh_model, tiny_images, tiny_held_out):
    config = TrainConfig(**QUICK | dict(steps=60, log_every=10, save_every=60, eval_every=30))
    trained = train(fresh_model(), tiny_images, config, run, held_out=tiny_held_out)
    assert not trained.training
    assert equal(trained, load_model(run, "vqvae"))
    lines = records(run)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [10, 20, 30, 40, 50, 60]
    assert training[-1]["loss"] < 0.7 * training[0]["loss"]
    assert {"reconstruction", "usage", "perplexity", "lr", "grad_norm", "images_per_s"} <= training[0].keys()
    held_out = [line for line in lines if "held_out/reconstruction" in line]
    assert [line["step"] for line in held_out] == [30, 60]
    assert not any("held_out/perplexity" in line or "held_out/commitment" in line for line in lines)
    images = tiny_held_out[np.arange(len(tiny_held_out))]["image"]
    expected = (trained.reconstruct(images) - images).square().mean().item()
    assert held_out[-1]["held_out/reconstruction"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, tiny_images, tiny_held_out, fresh_model, ema_decay):
    config = TrainConfig(**QUICK, ema_decay=ema_decay)
    whole = create_run(tmp_path / "whole", "vqvae", {}).path
    expected = train(fresh_model(), tiny_images, config, whole, held_out=tiny_held_out)

    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step-00000008")
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # cut short, as by a power failure
    model = fresh_model()
    torch.manual_seed(99)
    resumed = train(model, tiny_images, config, broken, held_out=tiny_held_out, resume=True)
    assert equal(resumed, expected)
    timing = {"images_per_s": 0}
    assert [r | timing for r in records(broken)] == [r | timing for r in records(whole)]


def test_resuming_before_the_first_checkpoint_starts_over(tmp_path, run, tiny_images, fresh_model):
    config = TrainConfig(**QUICK)
    expected = train(fresh_model(), tiny_images, config, create_run(tmp_path / "b", "vqvae", {}).path)
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    assert equal(train(fresh_model(), tiny_images, config, run, resume=True), expected)
    assert [r["step"] for r in records(run)] == [2, 4, 6, 8]


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(run, tiny_images, fresh_model):
    config = TrainConfig(**QUICK)
    expected = train(fresh_model(), tiny_images, config, run)
    again = train(fresh_model(), tiny_images, config, run, resume=True)
    assert equal(again, expected)


def test_looking_at_held_out_images_does_not_change_the_training(tmp_path, tiny_images, tiny_held_out, fresh_model):
    results = []
    for every in (0, 1):
        out = create_run(tmp_path / str(every), "vqvae", {}).path
        config = TrainConfig(**QUICK | dict(eval_every=every))
        results.append(train(fresh_model(), tiny_images, config, out, held_out=tiny_held_out))
    assert equal(*results)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(run, tiny_images, fresh_model):
    class Breaks(VQVAE):
        def training_step(self, batch, step):
            scalars = super().training_step(batch, step)
            return scalars | {"loss": scalars["loss"] * (math.nan if step + 1 == 7 else 1)}

    with pytest.raises(RunError, match=r"not finite .nan. at step 7 .*; the last good checkpoint .*step-00000004"):
        train(fresh_model(Breaks), tiny_images, TrainConfig(**QUICK), run)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert all(value.isfinite().all() for value in load_model(run, "vqvae").state_dict().values())


def test_each_training_in_a_process_has_its_own_precision(tmp_path, tiny_images, fresh_model):
    seen = []

    class Watched(VQVAE):
        def _decode(self, quantized):
            output = super()._decode(quantized)
            seen.append(output.dtype)
            return output

    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        out = create_run(tmp_path / precision, "vqvae", {}).path
        config = TrainConfig(**QUICK | dict(steps=40, log_every=10, save_every=40), precision=precision)
        trained = train(fresh_model(Watched), tiny_images, config, out)
        assert set(seen) == {dtype}
        seen.clear()
        losses = [r["loss"] for r in records(out) if "loss" in r]
        assert losses[-1] < 0.8 * losses[0]
        assert {p.dtype for p in trained.parameters()} == {torch.float32}


def test_learning_rate_rises_then_falls_along_a_cosine():
    config = TrainConfig(steps=110, warmup=10, lr=1.0)
    assert [learning_rate(config, step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(config, 10) == 1.0
    assert learning_rate(config, 60) == pytest.approx(0.5)
    assert learning_rate(config, 110) == pytest.approx(0.0)


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"ema_decay": 1.0}, {"warmup": -1}, {"clip_norm": -1.0}],
)
def test_settings_out_of_range_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainConfig(**change)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(device="cuda:1"), ValueError, "device: expected one of auto, cpu, got 'cuda:1'"),
        (dict(precision="fp8"), ValueError, "precision: expected one of fp32, bf16, fp16, got 'fp8'"),
        (dict(sharding="fsdp"), ValueError, "sharding: expected one of none, full, got 'fsdp'"),
        (dict(steps=10.5), TypeError, "steps: expected a whole number, got 10.5"),
        (dict(accumulation=0), ValueError, "accumulation: expected at least 1, got 0"),
    ],
)
def test_ways_to_train_that_there_are_not_are_named(change, error, words):
    with pytest.raises(error, match=words):
        TrainConfig(**change)
