"""What models draw is measured as drawn, and claims follow the figures."""

import numpy as np
import pytest
import torch

from vqfast.evaluate.frechet import Classifier
from vqfast.evaluate.generation import Samples, Trained, judge_samples, measure_samples


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier(1, 2, dim=16).eval()


def test_samples_are_measured_as_drawn(classifier):
    seen = []

    def draw(n, labels, *, generator):
        seen.append((n, labels.tolist()))
        return torch.randint(2, (n, 2, 2), generator=generator)

    decode = lambda codes: (255 * codes.repeat_interleave(4, 1).repeat_interleave(4, 2))[..., None].byte().numpy()
    labels = torch.arange(70) % 2
    found = measure_samples(
        draw, decode, labels, classifier, torch.zeros(1, 2, 2, dtype=torch.int64), torch.Generator().manual_seed(0)
    )
    assert [n for n, _ in seen] == [64, 6] and sum((part for _, part in seen), []) == labels.tolist()
    assert found.images.shape == (70, 8, 8, 1) and found.seconds.shape == (2,)
    assert found.copied == pytest.approx((found.images == 0).all((1, 2, 3)).mean())
    assert float(found.right.mean()) == pytest.approx(classifier.accuracy(found.images, labels.numpy()))
    assert found.grains is None


def test_grains_are_kept_where_they_are_drawn(classifier):
    def draw(n, labels, *, generator):
        return labels.view(n, 1, 1).expand(n, 4, 4), labels.view(n, 1, 1).expand(n, 2, 2)

    decode = lambda codes: (255 * codes.repeat_interleave(2, 1).repeat_interleave(2, 2))[..., None].byte().numpy()
    labels = torch.arange(70) % 2
    found = measure_samples(
        draw, decode, labels, classifier, torch.zeros(1, 4, 4, dtype=torch.int64), torch.Generator()
    )
    assert found.grains.shape == (70, 2, 2) and torch.equal(found.grains[:, 0, 0], labels)
    assert found.copied == 0.5, "the codes alone are compared: they are what is decoded"


def training(at: float, seconds: float, right: float, seed: int) -> Trained:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(50, 3, generator=generator) + at
    read = (torch.rand(50, generator=generator) < right).double()
    other = Samples(np.zeros((50, 1, 1, 1)), features + 100, 1 - read, torch.full((2,), 1e-9), 0.0)
    drawn = Samples(np.zeros((50, 1, 1, 1)), features, read, torch.full((2,), seconds), 0.0)
    return Trained(1, {"first": drawn, "second": other})


def test_claims_follow_the_figures_of_the_first_way():
    real = torch.randn(60, 3, generator=torch.Generator().manual_seed(9))
    ours = [training(0.0, 2.0, 0.9, seed) for seed in (0, 1)]
    theirs = [training(1.0, 1.0, 0.9, seed) for seed in (2, 3)]
    claims = judge_samples(ours, theirs, real, resamples=50)
    assert [claim.verdict for claim in claims] == ["holds", "undecided", "fails"]
    assert claims[2].difference == pytest.approx(-1)
    for claim, back in zip(claims, judge_samples(theirs, ours, real, resamples=50), strict=True):
        assert back.text == claim.text and back.difference == pytest.approx(-claim.difference)
    blind = [training(0.0, 1.0, 0.1, seed) for seed in (4, 5)]
    assert judge_samples(ours, blind, real, resamples=50)[1].verdict == "holds"
