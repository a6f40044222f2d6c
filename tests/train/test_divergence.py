"""What the watch over the loss promises: the first bad step, without a read at each step."""

import math

import pytest
import torch

from vqfast.models.vqvae import VQVAE
from vqfast.train import RunError, TrainConfig, create_run, train
from vqfast.train.divergence import DivergenceWatch

CPU = torch.device("cpu")


def watched(losses, explosion=10.0):
    watch = DivergenceWatch(explosion, CPU)
    for step, loss in enumerate(losses, 1):
        watch.see(torch.tensor(loss), step)
    return watch.read(watch.state[None])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_loss_that_is_not_finite_is_named(bad):
    found = watched([1.0, 2.0, bad, 1.0, bad])
    assert found.step == 3 and not math.isfinite(found.loss)
    assert "not finite" in str(found) and "step 3" in str(found)


def test_an_explosion_is_a_loss_far_above_what_was_usual():
    usual = [1.0 + 0.1 * (i % 3) for i in range(50)]
    found = watched([*usual, 20.0, 1.0])
    assert found.step == 51 and str(found) == "the loss exploded to 20 at step 51"
    assert watched([*usual, 8.0]) is None
    assert watched([*usual, 1e30], explosion=0) is None
    assert watched([1.0, 2.0, 1e6]) is None, "too early to tell"


def test_a_slow_rise_is_no_explosion():
    assert watched([1.01**i for i in range(2000)]) is None


def test_losses_below_zero_have_a_size_too():
    assert watched([-1.0] * 50) is None
    assert watched([-1.0] * 50 + [-100.0]).step == 51


def test_of_several_processes_the_first_fault_counts():
    states = torch.tensor([[7.0, math.nan], [2.0**62, 0.0], [5.0, math.inf]], dtype=torch.float64)
    assert DivergenceWatch.read(states).step == 5
    assert DivergenceWatch.read(states[1:2]) is None


class Explodes(VQVAE):
    """Its loss is a million times as large from step 31 on."""

    def training_step(self, batch, step):
        scalars = super().training_step(batch, step)
        return scalars | {"loss": scalars["loss"] * (1e6 if step >= 30 else 1)}


class BreaksItsGradient(VQVAE):
    """A finite loss with a gradient that is not, at step 4."""

    def training_step(self, batch, step):
        scalars = super().training_step(batch, step)
        if step == 3:
            weight = self.encoder_in.weight if hasattr(self, "encoder_in") else next(self.parameters())
            scalars["loss"] = scalars["loss"] + (weight - weight.detach()).abs().sum().sqrt()
        return scalars


@pytest.mark.parametrize(
    ("model_class", "message"),
    [(Explodes, "the loss exploded to .* at step 31 "), (BreaksItsGradient, "loss or its gradient .* at step 4 ")],
)
def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(
    tmp_path, fresh_model, tiny_images, model_class, message
):
    run = create_run(tmp_path / "run", "vqvae", {}).path
    config = TrainConfig(
        steps=60, batch_size=4, log_every=20, save_every=2, eval_every=0, warmup=0, device="cpu", tensorboard=False
    )
    with pytest.raises(RunError, match=message + r"\(its batch: images \d+, \d+, \d+, \d+ of the training data\)"):
        train(fresh_model(model_class), tiny_images, config, run)
    last = sorted((run / "checkpoints").iterdir())[-1].name
    assert last == ("step-00000030" if model_class is Explodes else "step-00000002")
