"""Precision and recall: their definition, pair by pair, and sense at the ends."""

import numpy as np
import pytest
import torch

from vqfast.evaluate import neighbours
from vqfast.evaluate.neighbours import precision_recall


def by_definition(real, generated, k):
    def covered(points, others):
        apart = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
        among = apart(others, others)
        np.fill_diagonal(among, np.inf)
        radii = np.sort(among, 1)[:, k - 1]
        return (apart(points, others) <= radii).any(1).mean()

    return covered(generated, real), covered(real, generated)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_they_are_those_of_the_definition(monkeypatch, k, offset):
    numbers = torch.Generator().manual_seed(k)
    real = torch.randn(70, 6, generator=numbers, dtype=torch.float64) + offset
    generated = 0.7 * torch.randn(50, 6, generator=numbers, dtype=torch.float64) + 0.5 + offset
    expected = by_definition(real.numpy(), generated.numpy(), k)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert precision_recall(real, generated, k) == pytest.approx(expected)
    monkeypatch.setattr(neighbours, "_DISTANCES", 64)  # a row at a time
    assert precision_recall(real, generated, k) == pytest.approx(expected)


def test_their_ends():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    one_mode = x[:1] + 1e-3 * torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    precision, recall = precision_recall(x, one_mode)
    assert precision == 1.0 and recall <= 1 / 40


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"expected features \(N, D\) and \(M, D\), got \(9, 3\) and \(9, 4\)"):
        precision_recall(torch.zeros(9, 3), torch.zeros(9, 4))
    with pytest.raises(ValueError, match="fewer neighbours than images, 9 real and 3 generated, got 3"):
        precision_recall(torch.zeros(9, 3), torch.zeros(3, 3))
