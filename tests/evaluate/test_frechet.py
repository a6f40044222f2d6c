"""The Frechet distance: that of the formula, and small between likes."""

import numpy as np
import pytest
import torch

from vqfast.evaluate.frechet import fit_classifier, frechet_distance


def test_it_is_that_of_gaussians_with_these_moments():
    torch.manual_seed(0)
    x = torch.randn(400, 3, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + torch.tensor([1.0, 2.0, 2.0])) == pytest.approx(9)
    # Scaled by 3: C2 = 9 C1, so the trace term is tr C1 (1 + 9 - 2 * 3).
    assert frechet_distance(x - x.mean(0), 3 * (x - x.mean(0))) == pytest.approx(4 * float(x.T.cov().trace()))


def test_it_is_that_of_the_matrix_square_root():
    torch.manual_seed(0)
    one, other = torch.randn(50, 4) @ torch.randn(4, 4), torch.randn(60, 4) @ torch.randn(4, 4) + 1
    c1, c2 = one.double().T.cov(), other.double().T.cov()
    values = torch.linalg.eigvals(c1 @ c2)
    mean = (one.double().mean(0) - other.double().mean(0)).square().sum()
    expected = mean + c1.trace() + c2.trace() - 2 * values.sqrt().real.sum()
    assert frechet_distance(one, other) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(other, one) == pytest.approx(float(expected), rel=1e-6)


def test_features_wider_than_there_are_images():
    assert np.isfinite(frechet_distance(torch.randn(5, 32), torch.randn(7, 32)))


@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5,), (5, 3))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="expected features"):
        frechet_distance(*(torch.randn(shape) for shape in shapes))


def test_a_classifier_tells_what_it_was_shown_and_its_features_tell_sets_apart():
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    images = rng.integers(0, 60, (120, 8, 8, 1))
    images[labels == 1, :, ::2] += 150  # stripes
    images = images.astype(np.uint8)
    before = torch.get_rng_state()
    classifier = fit_classifier(images[:80], labels[:80], steps=60)
    assert torch.equal(torch.get_rng_state(), before)
    assert classifier.accuracy(images[80:], labels[80:]) > 0.95
    features = classifier.features_of(images)
    assert features.shape == (120, 64)
    apart = frechet_distance(features[labels == 0], features[labels == 1])
    assert apart > 10 * frechet_distance(features[:60], features[60:])
