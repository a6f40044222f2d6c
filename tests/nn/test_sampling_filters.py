"""What is drawn from logits: never what a filter forbids, and everything else as often as it should be."""

import pytest
import torch

from vqfast.nn.sampling_filters import DrawOptions, draw, filter_logits, guide


def test_the_filters_are_those_of_the_released_code(golden):
    arrays = golden("dqtransformer_uncond")
    assert torch.equal(filter_logits(arrays["mask/content_in"], top_k=5), arrays["top_k5"])
    nucleus = filter_logits(arrays["top_p_in"].log(), top_p=0.7).softmax(-1)
    torch.testing.assert_close(nucleus, arrays["top_p70"], rtol=1e-5, atol=1e-7)


def test_the_nucleus_is_the_fewest_that_reach_p():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    kept = lambda p: filter_logits(logits, top_p=p).isfinite()[0].tolist()
    assert kept(0.39) == [False, True, False, False]
    assert kept(0.5) == [False, True, True, False]
    assert kept(0.8) == [False, True, True, True]
    assert kept(1.0) == [True] * 4
    assert kept(1e-9) == [False, True, False, False]


def test_the_nucleus_is_of_what_top_k_leaves():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the first two, 4/7 reaches a half; of all four, 0.4 does not.
    assert filter_logits(logits, top_k=2, top_p=0.5).isfinite()[0].tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("options", "p"),
    [
        (DrawOptions(), [0.1, 0.4, 0.3, 0.2]),
        (DrawOptions(top_k=2), [0, 4 / 7, 3 / 7, 0]),
        (DrawOptions(top_p=0.8), [0, 4 / 9, 3 / 9, 2 / 9]),
        (DrawOptions(temperature=0.5), [1 / 30, 16 / 30, 9 / 30, 4 / 30]),
    ],
)
def test_symbols_come_as_often_as_their_probability(options, p):
    n = 20_000
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().expand(n, 4)
    drawn = draw(logits, options, torch.Generator().manual_seed(0)).bincount(minlength=4) / n
    expected = torch.tensor(p)
    assert (drawn[expected == 0] == 0).all()
    assert ((drawn - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()


def test_what_is_forbidden_is_not_drawn():
    logits = torch.randn(1000, 9).masked_fill(torch.arange(9) != 3, -torch.inf)
    assert (draw(logits, DrawOptions(top_k=4, top_p=0.9)) == 3).all()


def test_guidance():
    conditional, unconditional = torch.randn(2, 3, 5)
    both = torch.cat([conditional, unconditional])
    assert torch.equal(guide(conditional, 1.0), conditional)
    torch.testing.assert_close(guide(both, 0.0), unconditional)
    torch.testing.assert_close(guide(both, 3.0), unconditional + 3 * (conditional - unconditional))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=0.0), "temperature: expected a number above 0, got 0.0"),
        (dict(top_k=0), "top_k: expected a whole number of at least 1, or None, got 0"),
        (dict(top_p=1.5, prefix="position_"), "position_top_p: expected a share in"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DrawOptions(**options)
