"""What a model with several optimisers is promised: parts in order, each moving its own parameters."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from vqfast.models import registry
from vqfast.train import RunError, TrainConfig, create_run, load_model, train
from vqfast.train.parts import training_parts

QUICK = dict(steps=6, batch_size=4, lr=1e-2, warmup=2, log_every=1, save_every=3, eval_every=3, tensorboard=False)


@dataclass(frozen=True)
class PairConfig:
    size: int = 16


class Pair(nn.Module):
    """A generator and the discriminator that judges it, one linear layer each."""

    training_parts = ("model", "discriminator")

    def __init__(self, config: PairConfig):
        super().__init__()
        self.config = config
        self.generator = nn.Linear(config.size, config.size)
        self.judge = nn.Linear(config.size, 1)
        self.calls: list[tuple[str, int, bool, bool]] = []
        self.draws: list[float] = []

    def part_parameters(self, part):
        return list({"model": self.generator, "discriminator": self.judge}[part].parameters())

    def training_step(self, batch, step, part="model"):
        self.calls.append((part, step, self.generator.weight.requires_grad, self.judge.weight.requires_grad))
        images = batch["image"].flatten(1)
        noise = torch.rand(())
        self.draws.append(noise.item())
        if part == "model":
            drawn = self.generator(images)
            self.left = (images, drawn.detach())
            return {
                "loss": (drawn - images).square().mean() - 0.1 * self.judge(drawn).mean(),
                "noise": noise,
            }
        seen, drawn = self.left
        assert torch.equal(seen, images), "the first part left its work on the same batch"
        return {"loss": (1 + self.judge(drawn)).relu().mean() + (1 - self.judge(images)).relu().mean()}


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(registry.MODELS, "pair", (Pair, PairConfig))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return Pair(PairConfig())


def run_of(folder):
    return create_run(folder, "pair", {}).path


def test_each_part_steps_in_its_turn_with_its_own_parameters(pair, tiny_images, tmp_path):
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    train(pair, tiny_images, TrainConfig(**QUICK), run_of(tmp_path / "run"))
    expected = [("model", step, True, False) for step in range(6)]
    assert pair.calls[::2] == expected
    assert pair.calls[1::2] == [("discriminator", step, False, True) for step in range(6)]
    assert all(parameter.requires_grad for parameter in pair.parameters())
    assert all(not torch.equal(value, before[name]) for name, value in pair.state_dict().items())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert '"discriminator/loss"' in lines[0] and '"discriminator/grad_norm"' in lines[0] and '"grad_norm"' in lines[0]


def test_the_steps_are_those_of_two_plain_optimisers(pair, tiny_images, tmp_path):
    config = TrainConfig(**QUICK | dict(clip_norm=0, warmup=0, steps=1))
    plain = Pair(PairConfig())
    plain.load_state_dict(pair.state_dict())
    train(pair, tiny_images, config, run_of(tmp_path / "run"))
    from vqfast.data import ShuffledSteps

    positions = next(iter(ShuffledSteps(len(tiny_images), 4, range(1), config.seed)))
    batch = tiny_images[positions]
    for part in Pair.training_parts:
        parameters = plain.part_parameters(part)
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)
        plain.zero_grad()
        plain.training_step(batch, 0, part)["loss"].backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(pair.state_dict()[name], value, rtol=0, atol=1e-7, msg=name)


def test_accumulated_batches_take_every_part_in_turn(pair, tiny_images, tmp_path):
    train(pair, tiny_images, TrainConfig(**QUICK | dict(accumulation=3, steps=2)), run_of(tmp_path / "run"))
    assert [(part, step) for part, step, *_ in pair.calls] == [
        (part, step) for step in range(2) for _ in range(3) for part in Pair.training_parts
    ]
    assert len(set(pair.draws)) == 12, "every batch and part has noise of its own"


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_resumed_pair_ends_with_the_same_bits(tiny_images, tiny_held_out, tmp_path, ema_decay):
    import shutil

    def fresh():
        torch.manual_seed(0)
        return Pair(PairConfig())

    config = TrainConfig(**QUICK, ema_decay=ema_decay)
    whole = run_of(tmp_path / "whole")
    expected = train(fresh(), tiny_images, config, whole, held_out=tiny_held_out).state_dict()
    broken = shutil.copytree(whole, tmp_path / "broken")
    shutil.rmtree(broken / "checkpoints" / "step-00000006")
    resumed = train(fresh(), tiny_images, config, broken, held_out=tiny_held_out, resume=True).state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    loaded = load_model(broken, "pair").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_a_discriminator_that_breaks_stops_the_run(pair, tiny_images, tmp_path, monkeypatch):
    step_of = Pair.training_step

    def breaks(self, batch, step, part="model"):
        scalars = step_of(self, batch, step, part)
        return scalars if part == "model" or step != 4 else {"loss": scalars["loss"] * float("inf")}

    monkeypatch.setattr(Pair, "training_step", breaks)
    with pytest.raises(RunError, match=r"not finite .nan. at step 5"):
        train(pair, tiny_images, TrainConfig(**QUICK), run_of(tmp_path / "run"))


def test_parts_that_overlap_or_are_empty_are_refused(pair, monkeypatch):
    monkeypatch.setattr(pair, "part_parameters", lambda part: list(pair.parameters()))
    with pytest.raises(ValueError, match="'model' and 'discriminator' share a parameter"):
        training_parts(pair)
    monkeypatch.setattr(pair, "part_parameters", lambda part: list(pair.generator.parameters()) * (part == "model"))
    with pytest.raises(ValueError, match="in part 'discriminator', got none"):
        training_parts(pair)
