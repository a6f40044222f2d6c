"""Sums over images promise: the same figures in any batches and any order, those of numpy and scipy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqfast.evaluate.averages import Averages
from vqfast.evaluate.codes import CodeCounts
from vqfast.evaluate.frechet import frechet_distance, frechet_of_moments
from vqfast.evaluate.moments import Moments

linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")


def features(seed, count, dim, offset=0.0):
    numbers = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=numbers, dtype=torch.float64)
    return torch.randn(count, dim, generator=numbers, dtype=torch.float64) @ mix + offset


@given(
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    offset=st.sampled_from([0.0, 1e6]),
)
@settings(max_examples=40, deadline=None)
def test_moments_are_numpys_in_any_order(parts, order, offset):
    x = features(1, sum(parts), 4, offset)
    batches = list(x.split(parts))
    order.shuffle(batches)
    found = Moments.of(batches[0])
    for batch in batches[1:]:
        found = found + Moments.of(batch)
    assert found.count == len(x)
    # Relative to what is summed: a mean of both signs may be as small as it likes.
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=0, atol=1e-13 * float(x.abs().mean()))
    if len(x) > 1:
        expected = np.cov(x.numpy(), rowvar=False)
        np.testing.assert_allclose(found.covariance, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("counts", [(60, 80), (300, 200)])
def test_the_distance_is_scipys(counts):
    dim = 64  # the first pair has covariances that are not of full rank or hardly
    one, other = features(2, counts[0], dim), features(3, counts[1], dim, 0.5)
    c1, c2 = (np.cov(x.numpy(), rowvar=False) for x in (one, other))
    mean = ((one.mean(0) - other.mean(0)) ** 2).sum().item()
    root = linalg.sqrtm(c1 @ c2)
    expected = mean + np.trace(c1) + np.trace(c2) - 2 * np.trace(root.real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-7)


def test_the_distance_is_that_of_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    images = torch.randint(0, 256, (2, 200, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    class Pixels(torch.nn.Module):
        num_features = 48

        def forward(self, x):
            return x.flatten(1).double()

    metric = fid.FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 4, 4))
    metric.set_dtype(torch.float64)
    for real, side in zip((True, False), images, strict=True):
        metric.update(side, real=real)
    ours = frechet_distance(*(side.flatten(1).double() for side in images))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-9)


def test_too_few_images_are_refused():
    one = Moments.of(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least two images each and of one size, got 1 images of 3 features"):
        frechet_of_moments(one, Moments.of(torch.zeros(5, 3)))
    with pytest.raises(ValueError, match=r"expected \(N, D\) with N at least 1, got \(0, 3\)"):
        Moments.of(torch.zeros(0, 3))


def test_averages_and_counts_of_parts_are_those_of_the_whole():
    values = torch.arange(10.0)
    parts = [Averages.of({"a": part, "b": -part}) for part in values.split([3, 1, 6])]
    assert (parts[0] + parts[1] + parts[2]).means() == {"a": 4.5, "b": -4.5}
    codes, lengths = torch.tensor([0, 0, 1, 3, 3, 3]), torch.tensor([1, 2, 3])
    whole = CodeCounts.of(codes, lengths, 4)
    halves = CodeCounts.of(codes[:3], lengths[:2], 4) + CodeCounts.of(codes[3:], lengths[2:], 4)
    assert halves.figures() == whole.figures()
    assert whole.figures() == {
        "codes_mean": 2.0,
        "codes_least": 1,
        "codes_most": 3,
        "codebook_size": 4,
        "codebook_usage": 0.75,
        "codebook_usage_10": 0.0,
        "perplexity": pytest.approx(3 ** (1 / 3) * 6 ** (1 / 6) * 2**0.5),
    }
