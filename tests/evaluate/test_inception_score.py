"""The inception score: its formula, by splits, from sums."""

import numpy as np
import pytest
import torch

from vqfast.evaluate.inception_score import InceptionScore

LOGITS = torch.randn(100, 7, generator=torch.Generator().manual_seed(0)) * 3
SPLITS = torch.arange(100) * 4 // 100


def test_it_is_the_formula_in_every_split():
    p = torch.softmax(LOGITS.double(), 1).numpy()
    expected = []
    for part in np.split(p, 4):
        expected.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    parts = [InceptionScore.of(LOGITS[i], SPLITS[i], 4) for i in torch.randperm(100).split(33)]
    found = parts[0] + parts[1] + parts[2] + parts[3]
    np.testing.assert_allclose(found.scores(), expected, rtol=1e-12)


def test_it_is_that_of_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.inception", reason="torchmetrics is not installed")

    class Logits(torch.nn.Module):
        def forward(self, x):
            return LOGITS[x[:, 0, 0, 0].long()]

    numbers = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    metric = image.InceptionScore(feature=Logits(), splits=1)
    metric.update(numbers)
    ours = InceptionScore.of(LOGITS, torch.zeros(100, dtype=torch.int64), 1).scores()
    assert ours.item() == pytest.approx(metric.compute()[0].item(), rel=1e-5)


def test_its_ends():
    sure = 1000 * torch.eye(5)
    zeros = torch.zeros(5, dtype=torch.int64)
    assert InceptionScore.of(sure, zeros, 1).scores().item() == pytest.approx(5)
    assert InceptionScore.of(torch.zeros(5, 5), zeros, 3).scores().tolist() == [pytest.approx(1)], "empty splits"
