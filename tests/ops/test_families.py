"""Every transition family against its definition: matrices of one-step transitions, multiplied and enumerated."""

import pytest
import torch

import vqfast
from vqfast.ops import (
    Absorbing,
    Marginal,
    MaskAndReplace,
    Transition,
    Uniform,
    diffusion_loss,
    p_sample,
    posterior,
    prior_kl,
    q_sample,
    registry,
)

BACKENDS = [b for b, reason in registry.status("cpu").items() if reason is None]
K, T = 5, 5
ALPHA = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.05, 0.0], dtype=torch.float64)
MASK = torch.tensor([0.0, 0.05, 0.25, 0.5, 0.8, 0.9], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0], dtype=torch.float64)
FAMILIES = {
    "uniform": Uniform(K, ALPHA),
    "absorbing": Absorbing(K, ALPHA),
    "mask_and_replace": MaskAndReplace(K, ALPHA, MASK),
    "marginal": Marginal(SHARES, ALPHA),
}
STEPS = [(1, 0), (3, 2), (4, 1), (5, 0), (5, 4)]


@pytest.fixture(params=FAMILIES)
def chain(request) -> Transition:
    return FAMILIES[request.param]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with vqfast.backend(request.param):
        yield request.param


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_step(chain: Transition, t: int) -> torch.Tensor:
    """(states, states) float64: row i is q(x_t | x_{t-1} = i), written down from the family's description."""
    noise = torch.full((K,), 1 / K, dtype=torch.float64) if chain.noise is None else chain.noise
    keep = chain.alpha_bar[t] / chain.alpha_bar[t - 1]
    mask = 1 - (1 - chain.mask_bar[t]) / (1 - chain.mask_bar[t - 1])
    replaced = 1 - keep - mask
    codes = keep * torch.eye(K, dtype=torch.float64) + replaced.where(replaced > 1e-12, 0) * noise
    if chain.mask_id is None:
        return codes
    top = torch.cat([codes, mask.expand(K, 1)], dim=1)
    return torch.cat([top, torch.eye(K + 1, dtype=torch.float64)[-1:]])


def between(chain: Transition, s: int, t: int) -> torch.Tensor:
    """q(x_t | x_s)."""
    product = torch.eye(chain.states, dtype=torch.float64)
    for level in range(s + 1, t + 1):
        product = product @ one_step(chain, level)
    return product


def enumerated(chain: Transition, p: torch.Tensor, x_t: int, t: int, s: int, rule: str) -> torch.Tensor:
    """(..., states): p(x_s | x_t) for p (..., K) of x_0, by summing over all x_0. x_t must be possible."""
    q_s, step = between(chain, 0, s)[:K], between(chain, s, t)
    joint = q_s * step[:, x_t]  # (x_0, x_s): q(x_s, x_t | x_0)
    given = joint.sum(1, keepdim=True)  # q(x_t | x_0)
    if rule == "joint":
        unnormalised = p @ joint
        return unnormalised / unnormalised.sum(-1, keepdim=True)
    # An x_0 that cannot have led to x_t has no posterior of x_s, and no weight.
    weight = p * (given[:, 0] > 0)
    return (weight / weight.sum(-1, keepdim=True)) @ (joint / given.clamp(min=1e-300))


def possible(chain: Transition, t: int, x0: int) -> list[int]:
    return [x for x in range(chain.states) if between(chain, 0, t)[x0, x] > 0]


class TestChain:
    def test_tables_are_the_product_of_the_steps(self, chain):
        noise = torch.full((K,), 1 / K, dtype=torch.float64) if chain.noise is None else chain.noise
        for t in range(T + 1):
            alpha, mask = chain.alpha_bar[t], chain.mask_bar[t]
            want = alpha * torch.eye(K, dtype=torch.float64) + (1 - alpha - mask) * noise
            got = between(chain, 0, t)[:K]
            torch.testing.assert_close(got[:, :K], want, rtol=0, atol=1e-14)
            if chain.mask_id is not None:
                torch.testing.assert_close(got[:, K], mask.expand(K), rtol=0, atol=1e-14)

    def test_forward_draws_have_the_marginals(self, chain, backend):
        n = 30_000
        for t in range(T + 1):
            x_t = q_sample(torch.full((1, n), 2), t, chain, generator=seeded(t))
            want = between(chain, 0, t)[2]
            counts = torch.bincount(x_t[0], minlength=chain.states).double()
            assert counts.shape == want.shape and counts[want == 0].sum() == 0
            assert ((counts - want * n).abs() <= 6 * (n * want * (1 - want)).sqrt() + 1e-9).all()

    def test_the_prior_is_where_the_chain_ends(self, chain):
        # alpha_bar[T] = 0: every x_0 ends in the same distribution.
        torch.testing.assert_close(between(chain, 0, T)[:K], chain.prior().expand(K, -1), rtol=0, atol=1e-14)
        assert (prior_kl(chain) == 0).all()

    @pytest.mark.parametrize("name", ["uniform", "mask_and_replace", "marginal"])
    def test_prior_kl_by_enumeration(self, name):
        shares = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04], dtype=torch.float64)
        chain = {
            "uniform": Uniform(K, ALPHA[:4]),
            "mask_and_replace": MaskAndReplace(K, ALPHA[:4], MASK[:4]),
            "marginal": Marginal(shares, ALPHA[:4]),
        }[name]
        q, prior = between(chain, 0, 3)[:K], chain.prior()
        torch.testing.assert_close(prior_kl(chain), (q * (q / prior).log()).sum(1), rtol=1e-12, atol=0)
        assert prior.sum() == pytest.approx(1, abs=1e-15)

    def test_prior_kl_is_infinite_where_the_mask_cannot_say_what_is_left_of_the_data(self):
        assert prior_kl(Absorbing(K, ALPHA[:4])).isinf().all()
        assert prior_kl(Marginal(SHARES, ALPHA[:4])).isinf().tolist() == [False] * 4 + [True]

    def test_a_draw_takes_each_code_of_the_noise_exactly_as_often_as_its_probability_says(self):
        """Cumulative sums of the noise are exact multiples of 2^-53, so a code owns exactly noise * 2^53 of the 2^53
        uniform numbers; on either side of each boundary the draw is looked at, tails of 1e-9 included.
        """
        from vqfast.kernels.q_sample.reference import draw_code

        for size in (2, 123, 1024, 50257):
            weight = torch.rand(size, generator=seeded(), dtype=torch.float64)
            weight[::2][:5] = 1e-9 * weight.sum()
            chain = Marginal(weight / weight.sum(), ALPHA)
            upper = (chain.noise.cumsum(0) * 2**53).long()
            assert torch.equal(upper.diff(prepend=upper.new_zeros(1)).double(), chain.noise * 2**53)
            torch.testing.assert_close(chain.noise, weight / weight.sum(), rtol=1e-6, atol=1e-15)
            codes = torch.arange(size)
            owned = chain.noise > 0
            first, last = torch.cat([upper.new_zeros(1), upper[:-1]]), upper - 1
            for number in (first, last):
                assert torch.equal(draw_code(number[owned] << 11, size, chain.noise), codes[owned])
            assert upper[-1] == 2**53

    @pytest.mark.parametrize("size", [2, 123, 1024, 50257])
    def test_draws_pass_a_chi_square_test_with_tails(self, size, backend):
        if backend == "triton":
            pytest.skip("it has no kernel for noise that is not uniform")
        weight = torch.rand(size, generator=seeded(), dtype=torch.float64) + 0.1
        weight[::2][:5] = 1e-9 * weight.sum()
        chain = Marginal(weight / weight.sum(), ALPHA)
        n = max(200_000, 20 * size)
        drawn = q_sample(torch.zeros(1, n, dtype=torch.int64), T, chain, generator=seeded(3))[0]
        expected = chain.noise * n
        common = expected > 1
        counts = torch.bincount(drawn, minlength=size).double()
        statistic = ((counts - expected)[common].square() / expected[common]).sum()
        freedom = common.sum() - 1
        assert statistic <= freedom + 5 * (2 * freedom).clamp(min=1).sqrt() + 1e-6
        assert counts[~common].sum() <= 1  # 1e-9 each: once in a thousand such tests


class TestPosterior:
    @pytest.mark.parametrize("rule", ["joint", "marginal"])
    @pytest.mark.parametrize(("t", "s"), STEPS)
    def test_is_the_sum_over_x0(self, chain, rule, t, s):
        logits = torch.randn(1, 1, K, generator=seeded(), dtype=torch.float64) * 2
        for x_t in {x for k in range(K) for x in possible(chain, t, k)}:
            got = posterior(logits, torch.tensor([[x_t]]), t, s, chain, rule=rule)
            assert got.shape == (1, 1, chain.states)
            want = enumerated(chain, logits[0, 0].softmax(-1), x_t, t, s, rule)
            torch.testing.assert_close(got[0, 0].exp(), want, rtol=1e-12, atol=1e-14)

    def test_of_a_certain_x0_is_the_same_by_both_rules(self, chain):
        logits = torch.eye(K, dtype=torch.float64).log()[None]
        for t, s in STEPS:
            for x0 in range(K):
                for x_t in possible(chain, t, x0):
                    got = [
                        posterior(logits[:, x0 : x0 + 1], torch.tensor([[x_t]]), t, s, chain, rule=rule).exp()
                        for rule in ("joint", "marginal")
                    ]
                    torch.testing.assert_close(got[0], got[1], rtol=1e-12, atol=1e-14)
                    want = between(chain, 0, s)[x0] * between(chain, s, t)[:, x_t]
                    torch.testing.assert_close(got[0][0, 0], want / want.sum(), rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("rule", ["joint", "marginal"])
    def test_has_a_gradient(self, chain, rule):
        logits = torch.randn(2, 3, K, generator=seeded(), dtype=torch.float64, requires_grad=True)
        x_t = q_sample(torch.randint(4, (2, 3), generator=seeded(1)), 3, chain, generator=seeded(2))
        torch.autograd.gradcheck(lambda x: posterior(x, x_t, 3, 1, chain, rule=rule).exp(), logits)


class TestLoss:
    @pytest.mark.parametrize("rule", ["joint", "marginal"])
    @pytest.mark.parametrize("aux_weight", [0.0, 0.2])
    @pytest.mark.parametrize(("t", "s"), STEPS)
    def test_value_and_gradient_are_those_of_the_enumerated_divergence(self, chain, backend, rule, aux_weight, t, s):
        pairs = [(x0, x_t) for x0 in range(K) for x_t in possible(chain, t, x0)]
        logits = torch.randn(1, len(pairs), K, generator=seeded(), dtype=torch.float64) * 2
        x0, x_t = (torch.tensor([[pair[i] for pair in pairs]]) for i in (0, 1))
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        if backend == "triton" and (rule == "marginal" or type(chain) is not Uniform):
            pytest.skip("it has no kernel for this")
        got = diffusion_loss(ours, x0, x_t, t, chain, s=s, rule=rule, aux_weight=aux_weight, reduction="none")
        got.sum().backward()

        want = []
        for n, (clean, noisy) in enumerate(pairs):
            p = theirs[0, n].softmax(-1)
            true = enumerated(chain, torch.eye(K, dtype=torch.float64)[clean], noisy, t, s, "joint")
            model = enumerated(chain, p, noisy, t, s, rule)
            on = true > 0
            want.append((true[on] * (true[on] / model[on]).log()).sum() - aux_weight * p[clean].log())
        want = torch.stack(want)
        want.sum().backward()
        torch.testing.assert_close(got[0], want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)

    def test_nothing_is_learnt_from_a_token_that_absorbing_diffusion_has_not_masked(self, backend):
        if backend == "triton":
            pytest.skip("it has no kernel for a mask state")
        logits = torch.full((1, 4, K), torch.nan)
        logits[0, 2:] = torch.randn(2, K, generator=seeded())
        logits.requires_grad_()
        x0, x_t = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, K, K]])
        loss = diffusion_loss(logits, x0, x_t, 3, FAMILIES["absorbing"], reduction="none")
        loss.sum().backward()
        assert (loss[0, :2] == 0).all() and (loss[0, 2:] > 0).all()
        assert (logits.grad[0, :2] == 0).all() and logits.grad.isfinite().all()
        cross_entropy = -logits.detach().log_softmax(-1).gather(-1, x0[..., None])[0, 2:, 0]
        revealed = (ALPHA[2] - ALPHA[3]) / (1 - ALPHA[3])
        torch.testing.assert_close(loss[0, 2:], cross_entropy * revealed)

    def test_weights_class_weights_and_mask_multiply_and_the_mean_is_over_the_tokens_that_count(self, chain, backend):
        if backend == "triton" and type(chain) is not Uniform:
            pytest.skip("it has no kernel for this")
        g = seeded()
        x0 = torch.randint(4, (3, 6), generator=g)
        t = torch.tensor([1, 3, 5])
        x_t = q_sample(x0, t, chain, generator=g)
        logits = torch.randn(3, 6, K, generator=g, dtype=torch.float64)
        weights, class_weights = torch.rand(3, generator=g), torch.rand(K, generator=g)
        mask = torch.rand(3, 6, generator=g) < 0.6
        options = dict(weights=weights, class_weights=class_weights, mask=mask)
        plain = diffusion_loss(logits, x0, x_t, t, chain, reduction="none")
        want = plain * weights.double()[:, None] * class_weights.double()[x0] * mask
        logits[~mask] = torch.nan
        for reduction, value in {"none": want, "sum": want.sum(), "mean": want.sum() / mask.sum()}.items():
            got = diffusion_loss(logits, x0, x_t, t, chain, reduction=reduction, **options)
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12)
        by_token = diffusion_loss(logits, x0, x_t, t, chain, weights=weights[:, None] * mask, reduction="none")
        torch.testing.assert_close(by_token, plain.where(mask, 0) * weights.double()[:, None], rtol=1e-6, atol=1e-12)


class TestReverse:
    @pytest.mark.parametrize("rule", ["joint", "marginal"])
    @pytest.mark.parametrize(("t", "s"), STEPS)
    def test_draws_follow_the_posterior(self, chain, backend, rule, t, s):
        if backend == "triton" and (rule == "marginal" or type(chain) is not Uniform):
            pytest.skip("it has no kernel for this")
        n = 20_000
        logits = torch.randn(K, generator=seeded()) * 2
        for x_t in {x for k in range(K) for x in possible(chain, t, k)}:
            rows = torch.full((1, n), x_t)
            drawn = p_sample(logits.expand(1, n, K), rows, t, s, chain, rule=rule, generator=seeded(x_t))
            with vqfast.backend("reference"):
                want = posterior(logits.double()[None, None], rows[:, :1], t, s, chain, rule=rule)[0, 0].exp()
            counts = torch.bincount(drawn[0], minlength=chain.states).double()
            assert ((counts - want * n).abs() <= 6 * (n * want * (1 - want)).sqrt() + 1e-6).all()

    def test_a_seed_gives_the_same_tokens_on_every_backend(self, chain):
        g = seeded()
        logits = torch.randn(4, 200, K, generator=g)
        x0 = torch.randint(4, (4, 200), generator=g)
        known = torch.where(torch.arange(200) % 4 == 0, x0, -1)
        drawn = []
        for name in BACKENDS:
            with vqfast.backend(name):
                if name == "triton" and type(chain) is not Uniform:
                    continue
                x_t = q_sample(x0, 4, chain, generator=seeded(1))
                drawn.append((x_t, p_sample(logits, x_t, 4, 1, chain, known=known, generator=seeded(2))))
        assert all(torch.equal(a, b) for pair in drawn for a, b in zip(pair, drawn[0], strict=True))

    def test_known_tokens_are_noised_to_the_level(self, chain, backend):
        if backend == "triton" and type(chain) is not Uniform:
            pytest.skip("it has no kernel for this")
        n = 30_000
        known, x_t = torch.full((1, n), 3), torch.zeros(1, n, dtype=torch.int64)
        drawn = p_sample(torch.zeros(1, n, K), x_t, 4, 2, chain, known=known, generator=seeded())
        want = between(chain, 0, 2)[3]
        counts = torch.bincount(drawn[0], minlength=chain.states).double()
        assert ((counts - want * n).abs() <= 6 * (n * want * (1 - want)).sqrt() + 1e-9).all()
        assert (p_sample(torch.zeros(1, n, K), x_t, 4, 0, chain, known=known) == 3).all()

    def test_only_the_masked_tokens_that_flip_are_read(self, backend):
        """Every logit is NaN: a token that is read takes a code of the noise, one that is not keeps its state."""
        if backend == "triton":
            pytest.skip("it has no kernel for a mask state")
        n = 20_000
        x_t = torch.where(torch.arange(n) % 2 == 0, K, 1)[None]
        drawn = p_sample(torch.full((1, n, K), torch.nan), x_t, 3, 2, FAMILIES["absorbing"], generator=seeded())
        assert (drawn[x_t == 1] == 1).all()
        flips = (ALPHA[2] - ALPHA[3]) / (1 - ALPHA[3])
        share = (drawn[x_t == K] < K).double().mean()
        assert abs(share - flips) < 6 * (flips * (1 - flips) / (n / 2)).sqrt()

    def test_the_last_step_leaves_no_mask(self, backend):
        if backend == "triton":
            pytest.skip("it has no kernel for a mask state")
        for logits in (torch.randn(2, 500, K), torch.full((2, 500, K), torch.nan)):
            for name in ("absorbing", "mask_and_replace"):
                drawn = p_sample(logits, torch.full((2, 500), K), 1, 0, FAMILIES[name])
                assert drawn.min() >= 0 and drawn.max() < K


class TestTruncation:
    """From pure noise to data in one step: a draw is one of the predicted p(x_0), truncated."""

    def draw(self, logits, **options):
        B, L, size = logits.shape
        chain = Absorbing(size, torch.tensor([1.0, 0.0], dtype=torch.float64))
        return p_sample(logits, torch.full((B, L), size), 1, 0, chain, generator=seeded(5), **options)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("options", [dict(top_k=1), dict(top_k=7), dict(top_p=0.6), dict(top_k=9, top_p=0.7)])
    def test_draws_stay_within_the_most_likely(self, backend, dtype, options):
        if backend == "triton":
            pytest.skip("it has no kernel for this")
        n, size = 20_000, 37
        row = (torch.randn(size, generator=seeded()) * 1.5).to(dtype)
        p, order = row.double().softmax(-1).sort(descending=True, stable=True)
        p[options.get("top_k", size) :] = 0
        kept = p.where(p.cumsum(0) - p < options.get("top_p", 1.0) * p.sum(), 0)
        want = torch.zeros(size, dtype=torch.float64).scatter(0, order, kept / kept.sum())
        drawn = self.draw(row.expand(1, n, size).contiguous(), **options)
        counts = torch.bincount(drawn[0], minlength=size).double()
        assert ((counts - want * n).abs() <= 6 * (n * want * (1 - want)).sqrt() + 1e-9).all()

    @pytest.mark.parametrize("value", [0.0, -3.5, 2.0])
    def test_of_equal_codes_the_lowest_are_kept(self, backend, value):
        if backend == "triton":
            pytest.skip("it has no kernel for this")
        row = torch.full((40,), value)
        row[30] = value + 1
        row[0] = value - 1
        rows = row.expand(1, 5000, 40).contiguous()
        assert set(self.draw(rows, top_k=4)[0].tolist()) == {1, 2, 3, 30}
        # p of the largest is e / (e + 38 + 1 / e) = 0.066, of the others 0.0243
        assert set(self.draw(rows, top_p=0.08)[0].tolist()) == {1, 30}
        assert set(self.draw(rows, top_p=0.06)[0].tolist()) == {30}

    def test_keeping_all_is_the_same_as_not_truncating(self, backend):
        if backend == "triton":
            pytest.skip("it has no kernel for this")
        rows = torch.randn(3, 100, 50, generator=seeded())
        assert torch.equal(self.draw(rows, top_k=50, top_p=1.0), self.draw(rows))
        assert torch.equal(self.draw(rows, top_k=90), self.draw(rows))

    @pytest.mark.parametrize("size", [1024, 50257])
    def test_large_vocabularies_keep_exactly_as_many_as_asked(self, size):
        row = torch.randn(size, generator=seeded()) * 0.1
        drawn = self.draw(row.expand(1, 2000, size), top_k=13)
        assert set(drawn[0].tolist()) == set(row.topk(13).indices.tolist())

    def test_guidance_goes_away_from_the_unconditional(self, backend):
        if backend == "triton":
            pytest.skip("it has no kernel for this")
        g, n = seeded(), 30_000
        logits, other = torch.randn(K, generator=g), torch.randn(K, generator=g)
        logits[1] = -torch.inf
        other[2] = -torch.inf
        rows = [x.expand(1, n, K).contiguous() for x in (logits, other)]
        drawn = self.draw(rows[0], unconditional=rows[1], guidance=2.5, temperature=1.5)
        scores = (other + 2.5 * (logits - other)) / 1.5
        scores[[1, 2]] = -torch.inf
        want = scores.double().softmax(-1)
        counts = torch.bincount(drawn[0], minlength=K).double()
        assert ((counts - want * n).abs() <= 6 * (n * want * (1 - want)).sqrt() + 1e-9).all()


class TestErrors:
    logits, codes = torch.zeros(2, 3, K), torch.zeros(2, 3, dtype=torch.int64)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (dict(rule="plug-in"), ValueError, "rule: expected 'joint' or 'marginal', got 'plug-in'"),
            (dict(mask=torch.ones(2, 4, dtype=torch.bool)), ValueError, r"mask: expected shape \(B, L\) = \(2, 3\)"),
            (dict(mask=torch.ones(2, 3)), TypeError, "mask: expected a bool tensor"),
            (dict(class_weights=torch.ones(6)), ValueError, r"class_weights: expected shape \(K,\) = \(5,\)"),
            (dict(weights=torch.ones(2, 2)), ValueError, r"weights: expected shape \(B,\) = \(2,\) or \(B, L\)"),
            (dict(x_t=codes + K), ValueError, r"x_t: expected values in 0..4 \(K = 5\)"),
        ],
    )  # fmt: skip
    def test_loss(self, change, error, words):
        arguments = dict(logits=self.logits, x0=self.codes, x_t=self.codes, t=2, transition=FAMILIES["uniform"])
        with pytest.raises(error, match=words):
            diffusion_loss(**arguments | change)

    def test_the_mask_state_is_a_state_of_families_that_have_one(self):
        diffusion_loss(self.logits, self.codes, self.codes + K, 2, FAMILIES["absorbing"])
        with pytest.raises(ValueError, match=r"x_t: expected values in 0..5 \(K = 5; K is the mask state\)"):
            diffusion_loss(self.logits, self.codes, self.codes + 6, 2, FAMILIES["absorbing"])

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (dict(top_k=0), "top_k: expected a whole number of at least 1"),
            (dict(top_k=2.0), "top_k: expected a whole number"),
            (dict(top_p=0.0), "top_p: expected a share above 0 and at most 1"),
            (dict(top_p=1.2), "top_p: expected a share above 0 and at most 1"),
            (dict(guidance=2.0), "unconditional: missing"),
            (dict(unconditional=logits), "guidance: missing"),
            (dict(unconditional=logits.double(), guidance=2.0), "unconditional: expected float32 tensor"),
            (dict(rule="both"), "rule: expected 'joint' or 'marginal'"),
        ],
    )
    def test_p_sample(self, change, words):
        arguments = dict(logits=self.logits, x_t=self.codes, t=2, s=1, transition=FAMILIES["uniform"])
        with pytest.raises(ValueError, match=words):
            p_sample(**arguments | change)

    def test_nan_logits_are_named_where_values_are_checked(self):
        logits = self.logits.clone()
        logits[1, 2, 3] = torch.nan
        chain = FAMILIES["uniform"]
        for call in (
            lambda: diffusion_loss(logits, self.codes, self.codes, 2, chain),
            lambda: p_sample(logits, self.codes, 2, 1, chain),
            lambda: posterior(logits, self.codes, 2, 1, chain),
        ):
            expected = r"logits: expected no NaN, got NaN in 1 tokens, the first at \[1, 2\]"
            with vqfast.checked(), pytest.raises(ValueError, match=expected):
                call()
        assert p_sample(logits, self.codes, 2, 1, chain).max() < K

    @pytest.mark.parametrize(
        ("make", "error", "words"),
        [
            (lambda: MaskAndReplace(K, ALPHA, MASK[:4]), ValueError, r"mask_bar: expected shape \(6,\)"),
            (lambda: MaskAndReplace(K, ALPHA, MASK + 0.1), ValueError, "mask_bar: expected 0 at level 0"),
            (lambda: MaskAndReplace(K, ALPHA, 1.2 - ALPHA), ValueError, "mask_bar: expected 0 at level 0"),
            (lambda: MaskAndReplace(K, ALPHA, MASK.tolist()), TypeError, "mask_bar: expected a floating-point tensor"),
            (
                lambda: MaskAndReplace(K, torch.tensor([1, 0.5, 0.5, 0.0]), torch.tensor([0, 0.0, 0.3, 1.0])),
                ValueError,
                "never to rise",
            ),
            (lambda: Marginal(torch.ones(4), ALPHA), ValueError, "distribution: expected probabilities of sum 1"),
            (lambda: Marginal(torch.ones(4).int(), ALPHA), TypeError, "distribution: expected a floating-point"),
            (lambda: Absorbing(0, ALPHA), ValueError, "codebook_size: expected at least 1"),
        ],
    )
    def test_tables(self, make, error, words):
        with pytest.raises(error, match=words):
            make()
