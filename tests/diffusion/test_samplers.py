"""Samplers beside the reverse chain: by confidence, between two images, on larger grids, in batches."""

import math

import pytest
import torch

from vqfast.diffusion import Absorbing, Uniform, WindowedDenoiser, interpolate, sample, sample_by_confidence, schedule
from vqfast.diffusion.confidence import masked_share
from vqfast.diffusion.windows import window_starts

K, T = 5, 24
SHARES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625], dtype=torch.float64)
MASKING, UNIFORM = Absorbing(K, schedule("linear", T)), Uniform(K, schedule("cosine", T))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_logits(logits):
    return lambda x_t, t, labels: logits.expand(*x_t.shape, -1)


def assert_shares(codes, expected):
    n = codes.numel()
    share = torch.bincount(codes.flatten(), minlength=K).double() / n
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1e-12).all(), share


class TestConfidence:
    def test_reveals_a_cosine_of_the_tokens_each_step(self):
        masked, levels = [], []

        def denoiser(x_t, t, labels):
            masked.append((x_t == K).sum(1).tolist())
            levels.append(t.tolist())
            return torch.zeros(*x_t.shape, K)

        L = 64
        codes = sample_by_confidence(denoiser, (2, L), MASKING, steps=6, generator=seeded())
        assert codes.min() >= 0 and codes.max() < K
        want = [L] + [int(L * math.cos(math.pi / 2 * i / 6)) for i in range(1, 6)]
        assert masked == [[n, n] for n in want]
        # The level at which the chain masks at least as large a share.
        assert levels == [[math.ceil(n / L * T - 1e-9)] * 2 for n in want]
        assert masked_share(6, 6) == 0

    def test_keeps_the_surest_first(self):
        # Token 0 is certain, the others are not: with choice_temperature 0 it is among those revealed first.
        logits = torch.zeros(4, K)
        logits[0, 3] = 50
        logits[1, 1] = 3
        seen = []

        def denoiser(x_t, t, labels):
            seen.append(x_t.clone())
            return logits.expand(x_t.shape[0], -1, -1)

        sample_by_confidence(denoiser, (200, 4), MASKING, steps=4, choice_temperature=0.0, generator=seeded())
        assert (seen[1][:, 0] == 3).all()

    def test_one_step_draws_from_the_model(self):
        codes = sample_by_confidence(same_logits(SHARES.log()), (4000, 3), MASKING, steps=1, generator=seeded())
        assert_shares(codes, SHARES)

    def test_known_tokens_and_guidance(self):
        known = torch.randint(-1, K, (64, 9), generator=seeded())

        def denoiser(x_t, t, labels):
            rows = torch.where((labels < 0)[:, None], torch.zeros(K), SHARES.float().log())
            return rows[:, None].expand(-1, x_t.shape[1], -1)

        labels = torch.zeros(64, dtype=torch.int64)
        options = dict(known=known, labels=labels, guidance_scale=30.0, batch_size=40, generator=seeded(1))
        codes = sample_by_confidence(denoiser, (64, 9), MASKING, **options)
        assert torch.equal(codes[known >= 0], known[known >= 0])
        assert (codes[known < 0] == 0).all()  # 30 times the logarithms leave one code

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            (dict(transition=UNIFORM), TypeError, "transition: expected vqfast.ops.Absorbing, got Uniform"),
            (dict(steps=0), ValueError, "steps: expected a whole number, at least 1"),
            (dict(choice_temperature=-1.0), ValueError, "choice_temperature: expected at least 0"),
            (dict(guidance_scale=2.0), ValueError, "labels: guidance_scale = 2.0 needs labels"),
        ],
    )
    def test_what_does_not_fit_is_named(self, options, error, words):
        with pytest.raises(error, match=words):
            sample_by_confidence(same_logits(SHARES.log()), (2, 3), **dict(transition=MASKING) | options)


class TestInterpolation:
    @pytest.mark.parametrize("chain", [MASKING, UNIFORM], ids=["absorbing", "uniform"])
    @pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
    def test_mixes_tokens_by_weight_and_keeps_what_noise_has_left(self, chain, weight):
        n, level = 20_000, 6
        first, second = torch.full((n, 1), 1), torch.full((n, 1), 2)
        # A denoiser that believes what it sees: what noise has not touched stays.
        certain = lambda x_t, t, labels: 60.0 * torch.nn.functional.one_hot(x_t, K + 1)[..., :K].float()
        codes = interpolate(certain, first, second, chain, level=level, weight=weight, steps=1, generator=seeded())
        alpha = chain.alpha_bar[level]
        rest = (1 - alpha) / K  # uniform noise, or the flat prediction of a masked token
        expected = torch.full((K,), float(rest), dtype=torch.float64)
        expected[1] += alpha * (1 - weight)
        expected[2] += alpha * weight
        if chain is MASKING:
            assert_shares(codes, expected)
        else:
            # The last step draws the prediction, which is x_t.
            assert_shares(codes, expected)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (dict(level=0), "level: expected a noise level in 1..24"),
            (dict(level=25), "level: expected a noise level in 1..24"),
            (dict(level=3, weight=1.5), "weight: expected a share in 0..1"),
            (dict(level=3, second=torch.zeros(2, 4).long()), r"second: expected shape \(2, 3\)"),
        ],
    )
    def test_what_does_not_fit_is_named(self, options, words):
        arguments = dict(first=torch.zeros(2, 3).long(), second=torch.zeros(2, 3).long(), transition=UNIFORM) | options
        with pytest.raises(ValueError, match=words):
            interpolate(same_logits(SHARES.log()), **arguments)


class TestWindows:
    @pytest.mark.parametrize(("size", "window", "stride"), [(8, 4, 2), (9, 4, 2), (7, 4, 4), (4, 4, 1), (5, 1, 1)])
    def test_cover_everything(self, size, window, stride):
        starts = window_starts(size, window, stride)
        covered = {i for first in starts for i in range(first, first + window)}
        assert covered == set(range(size)) and starts[-1] == size - window

    def test_a_grid_of_one_window_is_the_denoiser_itself(self):
        logits = torch.randn(2, 12, K, generator=seeded())
        denoiser = WindowedDenoiser(lambda x_t, t, labels: logits, (3, 4), (3, 4))
        got = denoiser(torch.zeros(2, 12).long(), torch.ones(2).long())
        torch.testing.assert_close(got, logits.log_softmax(-1))

    def test_overlaps_are_mixtures(self):
        """Two windows of 2 x 2 over 2 x 3: the first says code 0, the second 1, the column between half and half."""
        calls = []

        def denoiser(x_t, t, labels):
            calls.append(x_t.clone())
            return 80.0 * torch.nn.functional.one_hot(torch.full_like(x_t, len(calls) - 1), K).float()

        codes = torch.arange(6).view(1, 6) % K
        p = WindowedDenoiser(denoiser, (2, 3), (2, 2), (1, 1))(codes, torch.ones(1).long()).exp().view(2, 3, K)
        assert [c.tolist() for c in calls] == [[[0, 1, 3, 4]], [[1, 2, 4, 0]]]
        torch.testing.assert_close(p[..., 0], torch.tensor([[1, 0.5, 0], [1, 0.5, 0]]))
        torch.testing.assert_close(p[..., 1], torch.tensor([[0, 0.5, 1], [0, 0.5, 1]]))

    def test_outpainting_keeps_what_is_given(self):
        known = torch.full((3, 4, 6), -1)
        known[:, :, :3] = torch.randint(K, (3, 4, 3), generator=seeded())
        denoiser = WindowedDenoiser(same_logits(SHARES.log()), (4, 6), (4, 4))
        codes = sample(denoiser, (3, 24), MASKING, steps=5, known=known.flatten(1), generator=seeded())
        assert torch.equal(codes.view(3, 4, 6)[:, :, :3], known[:, :, :3]) and codes.max() < K

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (dict(window=(5, 2)), r"window: expected sizes in 1..grid \(4, 4\)"),
            (dict(window=(2, 2), stride=(3, 1)), r"stride: expected steps in 1..window \(2, 2\)"),
        ],
    )
    def test_what_does_not_fit_is_named(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            WindowedDenoiser(same_logits(SHARES.log()), (4, 4), **arguments)
        with pytest.raises(ValueError, match=r"x_t: expected \(B, 16\) for the grid 4 x 4"):
            WindowedDenoiser(same_logits(SHARES.log()), (4, 4), (2, 2))(torch.zeros(1, 9).long(), torch.ones(1))


class TestSample:
    def test_batches_of_any_size_give_all_samples(self):
        seen = []

        def denoiser(x_t, t, labels):
            seen.append((x_t.shape[0], labels.tolist()))
            return 50.0 * torch.nn.functional.one_hot(labels, K)[:, None].expand(-1, x_t.shape[1], -1).float()

        labels = torch.tensor([0, 3, 4, 1, 2])
        codes = sample(denoiser, (5, 6), MASKING, labels=labels, steps=1, batch_size=2)
        assert torch.equal(codes, labels[:, None].expand(5, 6))
        assert seen == [(2, [0, 3]), (2, [4, 1]), (1, [2])]
        assert sample(denoiser, (0, 6), MASKING, labels=labels[:0]).shape == (0, 6)

    def test_goes_on_from_a_given_level(self):
        levels = []

        def denoiser(x_t, t, labels):
            levels.append(t[0].item())
            return SHARES.log().expand(*x_t.shape, -1)

        start = torch.full((4000, 3), K)
        codes = sample(denoiser, (4000, 3), MASKING, start=start, start_level=9, steps=3, generator=seeded())
        assert levels == [9, 6, 3]
        assert_shares(codes, SHARES)

    def test_truncation_reaches_the_draw(self):
        codes = sample(same_logits(SHARES.log()), (2000, 3), MASKING, steps=3, top_k=2, generator=seeded())
        assert_shares(codes, torch.tensor([2 / 3, 1 / 3, 0, 0, 0], dtype=torch.float64))
        codes = sample(same_logits(SHARES.log()), (200, 3), UNIFORM, steps=3, top_p=0.4, generator=seeded())
        assert (codes == 0).all()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("chain", [MASKING, UNIFORM], ids=["absorbing", "uniform"])
    def test_a_captured_step_draws_the_same_distribution_anew_at_every_step(self, chain):
        logits = SHARES.log().cuda()

        def draw(seed):
            generator = torch.Generator("cuda").manual_seed(seed)
            options = dict(steps=6, device="cuda", generator=generator, cuda_graph=True)
            return sample(same_logits(logits), (4000, 3), chain, **options).cpu()

        first = draw(1)
        assert_shares(first, SHARES)
        assert torch.equal(draw(1), first) and not torch.equal(draw(2), first)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (dict(start_level=25, start=torch.zeros(2, 3).long()), "start_level: expected a level in 1..24"),
            (dict(start_level=4), "start: missing; start_level = 4"),
            (dict(start=torch.zeros(2, 4).long()), r"start: expected shape \(B, L\) = \(2, 3\)"),
            (dict(batch_size=0), "batch_size: expected at least 1"),
            (dict(cuda_graph=True), "cuda_graph: expected a CUDA device, got cpu"),
            (dict(rule="other"), "rule: expected 'joint' or 'marginal'"),
        ],
    )
    def test_what_does_not_fit_is_named(self, options, words):
        with pytest.raises(ValueError, match=words):
            sample(same_logits(SHARES.log()), (2, 3), MASKING, **options)
