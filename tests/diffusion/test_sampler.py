"""The sampler: the levels that it visits, the distribution that it draws from, what it keeps."""

import math
import sys

import pytest
import torch

from vqfast.diffusion import Uniform, sample, sample_steps, schedule

K, T = 5, 24
SHARES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625], dtype=torch.float64)
CHAIN = Uniform(K, schedule("cosine", T))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_logits(logits):
    """A denoiser that looks at nothing."""
    return lambda x_t, t, labels: logits.expand(*x_t.shape, -1)


def assert_shares(codes: torch.Tensor, expected: torch.Tensor) -> None:
    """Frequencies of codes within 5 standard errors of what is expected."""
    n = codes.numel()
    share = torch.bincount(codes.flatten(), minlength=K).double() / n
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all(), share


# The levels


@pytest.mark.parametrize("levels", [1, 2, 7, 100, 4000])
def test_steps_fall_strictly_from_T_to_0(levels):
    for n in {1, 2, 3, 5, 7, levels // 2, levels - 1, levels}:
        if not 1 <= n <= levels:
            continue
        steps = sample_steps(levels, n)
        assert len(steps) == n + 1 and steps[0] == levels and steps[-1] == 0
        gaps = [a - b for a, b in zip(steps[:-1], steps[1:], strict=True)]
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_all_levels_are_visited_unless_told_otherwise():
    assert sample_steps(4) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("n", [0, -1, T + 1, 2.0, True])
def test_a_number_of_steps_that_cannot_be_is_refused(n):
    with pytest.raises(ValueError, match=r"steps: expected a whole number in 1\.\.24 \(T = 24\)"):
        sample(same_logits(SHARES.log()), (2, 3), CHAIN, steps=n)


@pytest.mark.parametrize("steps", [None, 5])
def test_the_denoiser_is_called_once_a_level(steps):
    seen = []

    def denoiser(x_t, t, labels):
        seen.append(t.tolist())
        return torch.zeros(*x_t.shape, K)

    sample(denoiser, (3, 2), CHAIN, steps=steps)
    assert seen == [[t] * 3 for t in sample_steps(T, steps)[:-1]]


# The distribution


@pytest.mark.parametrize("steps", [None, 7, 1])
def test_the_true_model_draws_the_data_in_any_number_of_steps(steps):
    # For independent tokens the reverse chain of this prediction is exact, however many levels a step skips.
    codes = sample(same_logits(SHARES.log()), (4000, 3), CHAIN, steps=steps, generator=seeded())
    assert codes.shape == (4000, 3) and codes.dtype == torch.int64
    assert_shares(codes, SHARES)


def test_temperature_sharpens():
    codes = sample(same_logits(SHARES.log()), (4000, 3), CHAIN, steps=1, temperature=0.5, generator=seeded())
    assert_shares(codes, SHARES**2 / (SHARES**2).sum())


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_moves_log_probabilities_away_from_the_unconditional(scale):
    conditional, unconditional = SHARES.log(), SHARES.flip(0).sqrt().log() + 7

    def denoiser(x_t, t, labels):
        rows = torch.where((labels < 0)[:, None], unconditional, conditional)
        return rows[:, None].expand(-1, x_t.shape[1], -1)

    labels = torch.zeros(4000, dtype=torch.int64)
    codes = sample(denoiser, (4000, 3), CHAIN, labels=labels, steps=1, guidance_scale=scale, generator=seeded())
    assert_shares(codes, (unconditional + scale * (conditional - unconditional)).softmax(0))


def test_labels_reach_the_denoiser():
    def denoiser(x_t, t, labels):
        return 50.0 * torch.nn.functional.one_hot(labels, K)[:, None].expand(-1, x_t.shape[1], -1).float()

    labels = torch.tensor([0, 3, 4, 1])
    codes = sample(denoiser, (4, 6), CHAIN, labels=labels, steps=3)
    assert torch.equal(codes, labels[:, None].expand(4, 6))


def test_a_seed_gives_the_same_codes_again():
    draw = lambda seed: sample(same_logits(SHARES.log()), (8, 5), CHAIN, generator=seeded(seed))
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


# Inpainting


@pytest.mark.parametrize("steps", [None, 3, 1])
def test_known_codes_come_out_as_they_went_in(steps):
    known = torch.randint(-1, K, (64, 9), generator=seeded())
    codes = sample(same_logits(SHARES.log()), (64, 9), CHAIN, steps=steps, known=known, generator=seeded(1))
    assert torch.equal(codes[known >= 0], known[known >= 0])
    assert codes.min() >= 0 and codes.max() < K


def test_unknown_codes_are_drawn_from_the_model():
    known = torch.tensor([3, -1, 3]).expand(8000, 3)
    codes = sample(same_logits(SHARES.log()), (8000, 3), CHAIN, steps=6, known=known, generator=seeded())
    assert_shares(codes[:, 1], SHARES)


def test_the_denoiser_sees_known_codes_at_the_noise_of_the_level():
    known = torch.full((4000, 1), 2)
    seen = {}

    def denoiser(x_t, t, labels):
        seen[int(t[0])] = x_t.clone()
        return torch.zeros(*x_t.shape, K)

    sample(denoiser, (4000, 1), CHAIN, steps=4, known=known, generator=seeded())
    for t, x_t in seen.items():
        expected = CHAIN.alpha_bar[t].item() + (1 - CHAIN.alpha_bar[t].item()) / K
        error = math.sqrt(expected * (1 - expected) / 4000)
        assert abs((x_t == 2).double().mean().item() - expected) < 5 * error


# What it does not need, and what it refuses


def test_no_progress_bar_is_imported_unless_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    sample(same_logits(SHARES.log()), (2, 3), CHAIN)
    with pytest.raises(ImportError):
        sample(same_logits(SHARES.log()), (2, 3), CHAIN, progress=True)


def test_a_progress_bar_counts_the_steps(capfd):
    pytest.importorskip("tqdm")
    sample(same_logits(SHARES.log()), (2, 3), CHAIN, steps=7, progress=True)
    assert "/7" in capfd.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(guidance_scale=2.0), "labels: guidance_scale = 2.0 needs labels"),
        (
            dict(labels=torch.zeros(3, dtype=torch.int64)),
            r"labels: expected shape \(B,\) = \(2,\), got \(3,\)",
        ),
        (dict(known=torch.zeros(2, 4, dtype=torch.int64)), r"known: expected shape \(B, L\) = \(2, 3\)"),
        (dict(known=torch.full((2, 3), K)), r"0\.\.4|-1\.\.4"),
        (dict(temperature=0.0), "temperature: expected a number above 0"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        sample(same_logits(SHARES.log()), (2, 3), CHAIN, **options)


def test_a_denoiser_of_another_codebook_is_named():
    with pytest.raises(ValueError, match="logits: expected K = 5"):
        sample(lambda x_t, t, labels: torch.zeros(*x_t.shape, K - 1), (2, 3), CHAIN)
