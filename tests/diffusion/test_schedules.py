"""Noise schedules: the published tables, and what every schedule promises."""

import math

import pytest
import torch

from vqfast.diffusion import SCHEDULES, Uniform, schedule
from vqfast.diffusion.schedules import cosine, cosine_released, linear


@pytest.mark.parametrize("T", [100, 4000])
def test_the_released_cosine_is_the_released_table(golden, T):
    table = golden("multinomial_schedule")
    alpha_bar = cosine_released(T)
    alpha = alpha_bar[1:] / alpha_bar[:-1]
    index = table[f"T{T}/index"]  # of the step from level index + 1 to index
    for name, ours in {
        "log_alpha": alpha.log(),
        "log_1_min_alpha": torch.log1p(-alpha),
        "log_cumprod_alpha": alpha_bar[1:].log(),
        "log_1_min_cumprod_alpha": torch.log1p(-alpha_bar[1:]),
    }.items():
        torch.testing.assert_close(ours[index].float(), table[f"T{T}/{name}"], rtol=1e-6, atol=1e-7)


def test_the_released_cosine_agrees_with_the_double_precision_values():
    # Levels 1, 51 and 100 of T = 100, and the end of T = 4000, as the released formula gives them in float64.
    expected = {1: 0.9996843093705424, 51: 0.691566795722205, 100: 0.000492805466624515}
    alpha_bar = cosine_released(100)
    for level, value in expected.items():
        assert alpha_bar[level].item() == pytest.approx(value, rel=1e-12)
    assert cosine_released(4000)[-1].item() == pytest.approx(1.232063500331051e-05, rel=1e-12)


def test_the_papers_cosine_is_the_square_of_the_released_one():
    # But for the clip, which acts on the last step.
    torch.testing.assert_close(cosine(100)[:-1], cosine_released(100)[:-1] ** 2, rtol=1e-12, atol=0)
    assert cosine(4000)[2000].item() == pytest.approx(0.4938, abs=1e-4)


def test_cosine_takes_its_offset():
    assert cosine(10, s=0.0)[5].item() == pytest.approx(math.cos(math.pi / 4) ** 2)


def test_linear_falls_by_the_same_amount_each_step():
    assert linear(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 17, 4000])
def test_every_schedule_is_a_chain_that_a_transition_takes(name, T):
    alpha_bar = schedule(name, T)
    assert alpha_bar.shape == (T + 1,) and alpha_bar.dtype == torch.float64
    assert Uniform(5, alpha_bar).T == T
    assert (alpha_bar.diff() < 0).all()


def test_an_unknown_schedule_is_answered_with_the_names_of_the_known():
    with pytest.raises(ValueError, match="cosine, cosine_released, linear, reciprocal, got 'sigmoid'"):
        schedule("sigmoid", 10)


@pytest.mark.parametrize("T", [0, -3, 2.5, True])
def test_a_number_of_levels_that_is_none_is_refused(T):
    with pytest.raises(ValueError, match="T: expected a whole number"):
        schedule("linear", T)


def test_a_negative_offset_is_refused():
    with pytest.raises(ValueError, match="s: expected an offset"):
        cosine(10, s=-0.1)
