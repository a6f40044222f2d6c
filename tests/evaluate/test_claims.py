"""A claim holds where the figures leave little doubt, and a bootstrap knows how much they leave."""

import pytest
import torch

from vqfast.evaluate.claims import Claim, bootstrap, bootstrap_of_mean, table


@pytest.mark.parametrize(
    ("difference", "deviation", "verdict"),
    [(1.0, 0.4, "holds"), (-1.0, 0.4, "fails"), (0.5, 0.4, "undecided"), (-0.5, 0.4, "undecided"), (0, 0, "fails")],
)
def test_verdict_takes_two_standard_errors(difference, deviation, verdict):
    assert Claim("", difference, deviation, 0.5).verdict == verdict


def test_bootstrap_of_a_mean_has_its_standard_error():
    values = torch.randn(1, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.02
    judge = lambda seed: bootstrap("larger", lambda s, i: values[s][:, i].mean(), 1, 400, 1000, seed)
    claim = judge(0)
    assert claim.difference == pytest.approx(float(values.mean()))
    assert claim.deviation == pytest.approx(float(values.std()) / 20, rel=0.1)
    assert claim == judge(0) != judge(1)
    assert claim == bootstrap_of_mean("larger", values, 1000, 0)


def test_bootstrap_counts_how_trainings_differ():
    # Two trainings that agree on every image, but not with each other: more images tell nothing more.
    values = torch.tensor([[1.0], [3.0]]).expand(2, 1000)
    claim = bootstrap("larger", lambda s, i: values[s][:, i].mean(), 2, 1000, 1000, 0)
    assert claim.difference == 2 and claim.wins == 1
    assert claim.deviation == pytest.approx(0.5**0.5, rel=0.1)


def test_table_has_a_row_for_each_claim():
    lines = table([Claim("a", 2.0, 0.5, 0.75)], "images")
    assert lines[2:] == ["| a | holds | difference 2 +- 0.5, better on 75% of the images |"]
