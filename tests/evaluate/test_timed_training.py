"""Training for a time: it stops when that is over, has reported it all, and has learned."""

import pytest
import torch
from torch import nn

from vqfast.data import CodeBatches
from vqfast.evaluate import timed_training
from vqfast.evaluate.timed_training import fit_for


class Counter(nn.Module):
    """Learns the mean of the codes; keeps what it was and what it saw at each step."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))
        self.means, self.batches = [], []

    def training_step(self, batch, step):
        assert self.training and step == len(self.batches)
        self.batches.append(batch["codes"].flatten().tolist())
        self.means.append(self.mean.item())
        return {"loss": (batch["codes"].float() - self.mean).square().mean()}


@pytest.fixture
def ticking(monkeypatch):
    """A clock that a second passes on between two looks."""
    now = iter(range(10**6))
    monkeypatch.setattr(timed_training, "clock", lambda device: float(next(now)))


def fit(seconds, seed=0, report=lambda seconds: None):
    model = Counter()
    codes = torch.arange(12).view(12, 1, 1)
    steps = fit_for(model, CodeBatches(codes), seconds, batch_size=4, lr=0.1, seed=seed, report=report)
    return model, steps


def test_it_stops_when_the_time_is_over(ticking):
    reported = []
    model, steps = fit(30, report=reported.append)
    assert steps == len(model.batches) == len(reported) == 30 and sum(reported) == 30
    assert not model.training
    assert sorted(sum(model.batches[:3], [])) == list(range(12)), "an epoch has every image once"


def test_it_takes_a_step_in_no_time(ticking):
    assert fit(1e-9)[1] == 1


def test_the_learning_rate_falls_along_half_a_cosine(ticking):
    model, _ = fit(40)
    moved = torch.tensor(model.means).diff().abs()
    # Adam moves by the learning rate while gradients have one sign, and by next to nothing at its end.
    assert moved[0] == pytest.approx(0.1, rel=0.05) and moved[-1] < 0.002
    assert 1 < model.means[-1] < 5.5


def test_the_seed_decides_the_order_of_images(ticking):
    assert fit(5)[0].batches == fit(5)[0].batches != fit(5, seed=1)[0].batches
