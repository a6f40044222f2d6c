"""What the routers promise: the paper's budgets and gradients, the shares asked for, exact numbers of codes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqfast.nn.routers import (
    EntropyRouter,
    FeatureRouter,
    FixedRouter,
    RandomRouter,
    accumulate_entropies,
    code_lengths,
    counts_for_codes,
    grain_counts,
    ranked_grains,
    repeat_cells,
    select_grains,
    straight_through_gate,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def features(grains=2, batch=2, channels=32, side=4):
    return [torch.randn(batch, channels, side * 2**g, side * 2**g) for g in range(grains)]


# Feature router


@pytest.mark.parametrize("grains, layers, parameters", [(2, 2, 264_706), (3, 2, 594_435), (2, 1, 1024 + 1026)])
def test_the_router_has_the_published_size(grains, layers, parameters):
    with torch.device("meta"):
        router = FeatureRouter(256, grains, layers)
    assert sum(p.numel() for p in router.parameters()) == parameters


def test_training_draws_grains_and_every_parameter_learns():
    router = FeatureRouter(32, 3)
    maps = features(3)
    routing = router(maps)
    assert torch.equal(routing.gate.argmax(1), routing.grains)
    torch.testing.assert_close(routing.gate.sum(1), torch.ones(2, 4, 4))
    select_grains(maps, routing).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())


def test_the_draws_follow_the_softmax_of_the_logits():
    logits = torch.tensor([0.0, 1.0, -1.0]).expand(1, 100, 200, 3)
    drawn = straight_through_gate(logits).mean(dim=(0, 2, 3))
    torch.testing.assert_close(drawn, torch.tensor([0.0, 1.0, -1.0]).softmax(0), rtol=0, atol=0.015)


def test_the_straight_through_gradient_is_that_of_the_noisy_softmax():
    logits = torch.randn(2, 3, 3, 2, requires_grad=True)
    noise, weight = torch.randn(2, 3, 3, 2), torch.randn(2, 2, 3, 3)
    (straight_through_gate(logits, noise) * weight).sum().backward()
    expected = torch.autograd.grad(((logits + noise).softmax(-1).movedim(-1, 1) * weight).sum(), logits)[0]
    torch.testing.assert_close(logits.grad, expected)


def test_eval_takes_the_largest_logit_without_noise():
    router = FeatureRouter(32, 2).eval()
    maps = features()
    one, other = router(maps), router(maps)
    assert one.gate is None and torch.equal(one.grains, other.grains)
    assert torch.equal(one.grains, router.logits(maps).argmax(-1))
    assert torch.equal(one.grains, (one.scores > 0).long()), "two grains: the score is the logits' margin"


def test_a_cell_is_taken_from_the_feature_of_its_grain():
    coarse, median, fine = features(3, batch=1, channels=2, side=2)
    grains = torch.tensor([[[0, 1], [2, 0]]])
    selected = select_grains([coarse, median, fine], FixedRouter(0, 3)([coarse])._replace(grains=grains))
    assert torch.equal(selected[..., :4, :4], coarse[..., :1, :1].expand(1, 2, 4, 4))
    assert torch.equal(selected[..., :4, 4:], repeat_cells(median[..., :2, 2:], 2))
    assert torch.equal(selected[..., 4:, :4], fine[..., 4:, :4])
    assert torch.equal(selected[..., 4:, 4:], coarse[..., 1:, 1:].expand(1, 2, 4, 4))


# Entropy router


def images(count=8, side=64, patch=16):
    """Noise whose contrast differs from cell to cell, so that every cell has an entropy of its own."""
    contrast = torch.rand(count, 1, side // patch, side // patch).pow(2)
    return (torch.rand(count, 3, 1, 1) + repeat_cells(contrast, patch) * torch.randn(count, 3, side, side)).clamp(-1, 1)


def test_the_released_entropies_and_grains(golden):
    g = golden("dq_entropy")
    router = EntropyRouter(16, thresholds=(g["threshold"].item(),))
    torch.testing.assert_close(router.entropy(g["image"]), g["entropy"], rtol=0, atol=1e-4)
    assert torch.equal(router(None, g["image"]).grains, g["grain"])


@pytest.mark.parametrize("shares", [(0.5,), (0.25,), (0.3, 0.3)])
def test_per_image_every_image_gets_the_same_number_of_codes(shares):
    router = EntropyRouter(16, shares, per="image")
    routing = router(None, images())
    for grain, count in enumerate(grain_counts(shares, 16), start=1):
        assert ((routing.grains == grain).flatten(1).sum(1) == count).all()
    finest = routing.scores.where(routing.grains == len(shares), math.inf).amin((1, 2))
    coarsest = routing.scores.where(routing.grains == 0, -math.inf).amax((1, 2))
    assert (finest > coarsest).all()


@pytest.mark.parametrize("shares", [(0.5,), (0.2,), (0.3, 0.3)])
def test_per_dataset_the_shares_hold_over_all_images_that_were_seen(shares):
    router = EntropyRouter(16, shares)
    data = images(64)
    for batch in data.split(16):
        router(None, batch)
    routing = router.eval()(None, data)
    for grain, share in enumerate(shares, start=1):
        assert (routing.grains == grain).double().mean().item() == pytest.approx(share, abs=0.01)
    assert code_lengths(routing.grains).unique().numel() > 1, "by the data set, images differ in their number of codes"
    expected = torch.quantile(router.entropy(data).double(), 1 - sum(shares)).item()
    assert router.thresholds[0].item() == pytest.approx(expected, abs=0.01)


def test_before_any_image_was_seen_the_image_itself_decides_and_eval_does_not_learn():
    router, data = EntropyRouter(16).eval(), images()
    assert (code_lengths(router(None, data).grains) == 8 + 8 * 4).all()
    assert router.histogram.sum() == 0
    router.train().decide(None, data)
    assert router.histogram.sum() == 0, "a decision is not a training step"
    router(None, data)
    assert router.histogram.sum() == 8 * 16


def test_batches_of_one_step_are_routed_by_what_was_seen_before_it():
    whole, parts, data = EntropyRouter(16), EntropyRouter(16), images(32)
    for router in (whole, parts):
        router(None, data[:8])
    expected = whole(None, data[8:]).grains
    with accumulate_entropies(parts):
        grains = torch.cat([parts(None, batch).grains for batch in data[8:].split(8)])
    assert torch.equal(grains, expected) and torch.equal(parts.histogram, whole.histogram)
    with pytest.raises(KeyError), accumulate_entropies(parts):
        parts(None, data)
        raise KeyError
    parts(None, data[:8])
    assert parts.histogram.sum() == 40 * 16, "what was seen before an error does not count"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_the_module_leaves_what_was_seen_exact(dtype):
    exact, cast, data = EntropyRouter(16), EntropyRouter(16).to(dtype), images(64)
    for router in (exact, cast):
        for batch in data.split(16):
            router(None, batch)
    assert torch.equal(exact.histogram, cast.histogram) and torch.equal(exact.thresholds, cast.thresholds)


def test_counts_saved_as_float_load():
    seen, loaded = EntropyRouter(16), EntropyRouter(16)
    seen(None, images())
    loaded.load_state_dict({"histogram": seen.histogram.double()})
    assert torch.equal(seen.thresholds, loaded.thresholds)


@pytest.mark.parametrize(
    ("router", "shown"),
    [
        (EntropyRouter(8, (0.3,)), "EntropyRouter(patch_size=8, shares=(0.3,), per='dataset')"),
        (EntropyRouter(8, thresholds=(1.5,)), "EntropyRouter(patch_size=8, shares=(0.5,), thresholds=(1.5,))"),
        (RandomRouter((0.3, 0.3)), "RandomRouter(shares=(0.3, 0.3))"),
        (FixedRouter(1), "FixedRouter(grain=1, grains=2)"),
    ],
)
def test_a_printed_router_says_how_it_chooses(router, shown):
    assert repr(router) == shown


def test_flat_images_route():
    router = EntropyRouter(16, per="image")
    assert (code_lengths(router(None, torch.zeros(2, 3, 64, 64)).grains) == 40).all()


# Random and fixed


def test_random_grains_have_the_shares_and_differ():
    router = RandomRouter((0.3, 0.3))
    first, second = router(features(3)).grains, router(features(3)).grains
    assert (first == 2).sum() == 2 * 5 and (first == 1).sum() == 2 * 5
    assert not torch.equal(first, second)


def test_fixed_grains():
    assert (FixedRouter(1, 2)(features()).grains == 1).all()
    with pytest.raises(ValueError, match=r"grain: expected a number in \[0, 2\), got 2"):
        FixedRouter(2, 2)


# Numbers of codes


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.data(), st.sampled_from([(0.5,), (0.1,), (0.3, 0.3), (0.0, 0.2), (0.9, 0.1), (0.0, 0.0)]))
def test_the_counts_reach_the_target_or_the_largest_number_below(cells, data, shares):
    finest = 4 ** len(shares)
    target = data.draw(st.integers(cells, cells * finest))
    counts = counts_for_codes(target, cells, shares)
    codes = cells + sum((4**g - 1) * n for g, n in enumerate(counts, start=1))
    assert min(counts) >= 0 and sum(counts) <= cells
    reachable = {
        cells + 3 * m + (finest - 1) * f * (len(shares) - 1)
        for m in range(cells + 1)
        for f in range(cells + 1 - m if len(shares) > 1 else 1)
    }
    assert codes == max(n for n in reachable if n <= target)
    scores = torch.randn(2, 1, cells)
    assert code_lengths(ranked_grains(scores, counts)).tolist() == [codes, codes]


def test_three_grains_keep_their_proportion():
    median, fine = counts_for_codes(410, 64, (0.3, 0.3))
    assert abs(median - fine) <= 5 and 64 + 3 * median + 15 * fine == 409


def test_counts_of_each_image_and_ties_in_raster_order():
    grains = ranked_grains(torch.zeros(2, 2, 2), torch.tensor([[1, 1], [0, 3]]))
    assert grains.tolist() == [[[2, 1], [0, 0]], [[2, 2], [2, 0]]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureRouter(32, 1), "grains: expected at least 2, got 1"),
        (lambda: FeatureRouter(32, 2, 3), "layers: expected 1 or 2, got 3"),
        (lambda: FeatureRouter(48), "channels: expected a multiple of 32"),
        (lambda: EntropyRouter(16, (0.6, 0.6)), "shares: expected numbers"),
        (lambda: EntropyRouter(0), "patch_size: expected at least 1, got 0"),
        (lambda: EntropyRouter(16, per="batch"), "per: expected 'dataset' or 'image', got 'batch'"),
        (lambda: EntropyRouter(16, thresholds=(1.0, 2.0)), "thresholds: expected 1 rising"),
        (lambda: RandomRouter(()), "shares"),
        (lambda: counts_for_codes(15, 16, (0.5,)), r"target_codes: expected from 16 \(all coarse\) to 64 \(all fine\)"),
        (lambda: counts_for_codes(65, 16, (0.5,)), "target_codes"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
