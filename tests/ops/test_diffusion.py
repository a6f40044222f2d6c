"""Promises of q_sample, diffusion_loss and p_sample: distributions, gradients, randomness, errors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import vqfast
from vqfast import ops
from vqfast.diffusion.schedules import schedule
from vqfast.kernels.diffusion_loss.reference import diffusion_loss as definition
from vqfast.kernels.philox import philox
from vqfast.kernels.posterior.reference import posterior
from vqfast.ops import Absorbing, Uniform, diffusion_loss, p_sample, q_sample, registry

BACKENDS = [b for b, reason in registry.status("cpu").items() if reason is None]
ALPHA_BAR = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.05, 0.0], dtype=torch.float64)
K = 6
TRANSITION = Uniform(K, ALPHA_BAR)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with vqfast.backend(request.param):
        yield request.param


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chi_square_is_small(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Pearson's statistic within six standard deviations of its mean; categories of probability 0 must be empty."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - expected).square() / expected).sum()
    freedom = possible.sum() - 1
    return bool(statistic <= freedom + 6 * (2 * freedom.clamp(min=1)).sqrt())


def test_philox_gives_the_published_vectors():
    """Known answers of Random123 for Philox 4x32-10: counter and key of zeros, and of ones."""
    zero = philox(torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0)
    words = [z.item() & 0xFFFFFFFFFFFFFFFF for z in zero]
    assert [f"{w & 0xFFFFFFFF:08x}{w >> 32:08x}" for w in words] == ["6627e8d5e169c58d", "bc57ac4c9b00dbd8"]
    ones = philox(torch.tensor([-1, -1]), torch.tensor([-1]), 0xFFFFFFFF)
    words = [z.item() & 0xFFFFFFFFFFFFFFFF for z in ones]
    assert [f"{w & 0xFFFFFFFF:08x}{w >> 32:08x}" for w in words] == ["408f276d41c83b0e", "a20bc7c66d5451fd"]


class TestForward:
    @pytest.mark.parametrize("t", [0, 1, 3, 5])
    def test_has_the_marginal_of_the_chain(self, backend, t):
        x_t = q_sample(torch.full((1, 60_000), 2), t, TRANSITION, generator=seeded())
        probabilities = torch.full((K,), (1 - ALPHA_BAR[t]) / K)
        probabilities[2] += ALPHA_BAR[t]
        assert chi_square_is_small(torch.bincount(x_t[0], minlength=K).double(), probabilities)

    def test_every_sample_has_its_own_level(self, backend):
        x0 = torch.full((2, 4000), 1)
        x_t = q_sample(x0, torch.tensor([0, 5]), TRANSITION, generator=seeded())
        assert torch.equal(x_t[0], x0[0]) and (x_t[1] != 1).float().mean() > 0.7

    def test_a_seed_gives_one_sample_whatever_the_backend(self):
        samples = []
        for name in BACKENDS:
            with vqfast.backend(name):
                samples.append(q_sample(torch.arange(600).view(4, 150) % K, 3, TRANSITION, generator=seeded(7)))
        assert all(torch.equal(s, samples[0]) for s in samples)
        assert not torch.equal(
            samples[0], q_sample(torch.arange(600).view(4, 150) % K, 3, TRANSITION, generator=seeded(8))
        )


class TestReverse:
    @pytest.mark.parametrize(("t", "s"), [(1, 0), (3, 2), (4, 1), (5, 0)])
    def test_has_the_posterior_of_the_step(self, backend, t, s):
        g = seeded()
        logits = torch.randn(K, generator=g) * 2
        x_t, n = 4, 60_000
        drawn = p_sample(
            logits.expand(1, n, K), torch.full((1, n), x_t), t, s, TRANSITION, generator=g, temperature=0.8
        )
        step = torch.tensor([[x_t]]), torch.tensor([t]), torch.tensor([s]), ALPHA_BAR[:, None], None, False
        want = posterior(logits.double().view(1, 1, K) / 0.8, *step)
        assert chi_square_is_small(torch.bincount(drawn[0], minlength=K).double(), want.exp().view(K))

    def test_known_tokens_are_renoised_and_exact_at_the_end(self, backend):
        x_t, known = torch.zeros(1, 40_000, dtype=torch.int64), torch.full((1, 40_000), -1)
        known[:, ::2] = 3
        logits = torch.zeros(1, 40_000, K)
        last = p_sample(logits, x_t, 1, 0, TRANSITION, known=known, generator=seeded())
        assert (last[:, ::2] == 3).all()
        early = p_sample(logits, x_t, 4, 2, TRANSITION, known=known, generator=seeded())[0, ::2]
        probabilities = torch.full((K,), (1 - ALPHA_BAR[2]) / K)
        probabilities[3] += ALPHA_BAR[2]
        assert chi_square_is_small(torch.bincount(early, minlength=K).double(), probabilities)

    def test_impossible_codes_are_never_drawn_at_the_last_step(self, backend):
        logits = torch.zeros(1, 5000, K)
        logits[..., [0, 5]] = -torch.inf
        drawn = p_sample(logits, torch.full((1, 5000), 2), 2, 0, TRANSITION, generator=seeded())
        assert not bool(((drawn == 0) | (drawn == 5)).any())

    def test_nan_logits_keep_the_token(self, backend):
        x_t = torch.arange(12).view(1, 12) % K
        assert torch.equal(p_sample(torch.full((1, 12, K), torch.nan), x_t, 3, 1, TRANSITION), x_t)


class TestLoss:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("aux_weight", [0.0, 0.3])
    def test_value_and_gradient_are_those_of_the_definition(self, backend, reduction, aux_weight):
        g = seeded()
        x0 = torch.randint(K, (5, 8), generator=g)
        t = torch.tensor([1, 2, 3, 4, 5])
        s = torch.tensor([0, 1, 0, 2, 4])
        x_t = q_sample(x0, t, TRANSITION, generator=g)
        logits = torch.randn(5, 8, K, generator=g, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(5, generator=g) + 0.5
        probe = torch.randn(5, 8, generator=g, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7)

        got = diffusion_loss(
            logits, x0, x_t, t, TRANSITION, s=s, aux_weight=aux_weight, weights=weights, reduction=reduction
        )
        (got_grad,) = torch.autograd.grad((got * probe).sum(), logits)
        tokens = (
            definition(logits, x0, x_t, t, s, ALPHA_BAR[:, None], None, False, aux_weight) * weights.double()[:, None]
        )
        want = {"mean": tokens.mean(), "sum": tokens.sum(), "none": tokens}[reduction]
        (want_grad,) = torch.autograd.grad((want * probe).sum(), logits)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got_grad, want_grad)

    def test_is_never_negative_and_zero_for_a_certain_prediction(self, backend):
        g = seeded()
        x0 = torch.randint(K, (40, 16), generator=g)
        t = torch.arange(40) % 5 + 1
        x_t = q_sample(x0, t, TRANSITION, generator=g)
        loss = diffusion_loss(torch.randn(40, 16, K, generator=g), x0, x_t, t, TRANSITION, reduction="none")
        assert loss.min() >= -1e-6
        certain = torch.nn.functional.one_hot(x0, K) * 200.0
        assert diffusion_loss(certain, x0, x_t, t, TRANSITION, reduction="none").abs().max() < 1e-6

    def test_second_pass_through_the_graph_is_refused_not_wrong(self, backend):
        logits = torch.randn(2, 3, K, requires_grad=True)
        x0 = torch.zeros(2, 3, dtype=torch.int64)
        loss = diffusion_loss(logits, x0, x0, 2, TRANSITION)
        loss.backward(torch.tensor(2.0), retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_compiles_without_a_break_and_without_a_recompile_for_another_batch(self):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")

        @torch.compile(backend=counter, fullgraph=True, dynamic=True)
        def step(logits, x0, t):
            x_t = q_sample(x0, t, TRANSITION)
            return diffusion_loss(logits, x0, x_t, t, TRANSITION) * 3, p_sample(logits, x_t, t, 0, TRANSITION), x_t

        compiled = []
        for batch in (3, 4, 33):
            logits = torch.randn(batch, 7, K, requires_grad=True)
            x0, t = torch.randint(K, (batch, 7)), torch.randint(1, 6, (batch,))
            loss, x_s, x_t = step(logits, x0, t)
            loss.backward()
            copy = logits.detach().requires_grad_()
            eager = diffusion_loss(copy, x0, x_t, t, TRANSITION) * 3
            eager.backward()
            torch.testing.assert_close(loss, eager)
            torch.testing.assert_close(logits.grad, copy.grad)
            assert x_s.shape == x0.shape
            compiled.append(counter.frame_count)
        assert len(set(compiled)) == 1

    def test_posteriors_gradient_compiles_too(self):
        torch._dynamo.reset()
        logits = torch.randn(2, 7, K, requires_grad=True)
        x_t, t = torch.randint(K, (2, 7)), torch.tensor([2, 5])
        compiled = torch.compile(
            lambda logits: ops.posterior(logits, x_t, t, t - 1, TRANSITION).exp(), backend="aot_eager", fullgraph=True
        )
        probe = torch.randn(2, 7, K)
        want, got = ops.posterior(logits, x_t, t, t - 1, TRANSITION).exp(), compiled(logits)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad((p * probe).sum(), logits)[0] for p in (got, want)))

    def test_a_gradient_of_the_gradient_is_refused_not_wrong(self):
        logits, x_t = torch.randn(2, 3, K, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
        p = ops.posterior(logits, x_t, 2, 1, TRANSITION).exp()
        (grad,) = torch.autograd.grad(p.square().sum(), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    def test_writes_no_gradient_where_none_is_asked_for(self, monkeypatch):
        asked = []
        kernels = registry.BACKENDS["reference"].KERNELS
        kernel = kernels["diffusion_loss"]
        monkeypatch.setitem(kernels, "diffusion_loss", lambda *a: asked.append(a[-1]) or kernel(*a))
        x0 = torch.zeros(2, 3, dtype=torch.int64)
        logits = torch.randn(2, 3, K, requires_grad=True)
        with vqfast.backend("reference"):
            diffusion_loss(logits, x0, x0, 2, TRANSITION)
            diffusion_loss(logits.detach(), x0, x0, 2, TRANSITION)
            with torch.no_grad():
                diffusion_loss(logits, x0, x0, 2, TRANSITION)
        assert asked == [True, False, False]

    def test_float16_scaler_reaches_the_gradient(self, backend):
        logits = torch.randn(2, 3, K).half().requires_grad_()
        x0 = torch.zeros(2, 3, dtype=torch.int64)
        (diffusion_loss(logits, x0, x0, 2, TRANSITION) * 1024).backward()
        wide = logits.detach().float().requires_grad_()
        diffusion_loss(wide, x0, x0, 2, TRANSITION).backward()
        torch.testing.assert_close(logits.grad.float(), wide.grad * 1024, rtol=4e-3, atol=1e-2)


class TestErrors:
    logits, codes = torch.zeros(2, 3, K), torch.zeros(2, 3, dtype=torch.int64)

    def loss(self, **change):
        arguments = dict(logits=self.logits, x0=self.codes, x_t=self.codes, t=2, transition=TRANSITION) | change
        return diffusion_loss(**arguments)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (dict(logits=torch.zeros(2, 3)), ValueError, r"logits: expected three dimensions \(B, L, K\)"),
            (dict(logits=torch.zeros(2, 3, 7)), ValueError, r"logits: expected K = 6 of Uniform.*\(2, 3, 7\)"),
            (dict(logits=torch.zeros(2, 3, 6).int()), TypeError, r"logits: expected a float64"),
            (dict(x0=codes.int()), TypeError, r"x0: expected an int64 tensor of shape \(B, L\)"),
            (dict(x0=torch.zeros(2, 4, dtype=torch.int64)), ValueError, r"x0: expected shape \(B, L\) = \(2, 3\)"),
            (dict(x0=codes + 6), ValueError, r"x0: expected values in 0..5 \(K = 6\), got 6..6"),
            (dict(x_t=codes - 1), ValueError, r"x_t: expected values in 0..5 \(K = 6\), got -1..-1"),
            (dict(t=0), ValueError, r"t: expected values in 1..5 \(T = 5\), got 0..0"),
            (dict(t=6), ValueError, r"t: expected values in 1..5 \(T = 5\), got 6..6"),
            (dict(t=2.0), TypeError, r"t: expected an int or an int64 tensor \(B,\), got float"),
            (dict(t=torch.tensor([1, 2, 3])), ValueError, r"t: expected shape \(B,\) = \(2,\)"),
            (dict(t=3, s=3), ValueError, r"s: expected s < t in every sample"),
            (dict(t=3, s=-1), ValueError, r"s: expected values in 0..4"),
            (dict(weights=torch.ones(3)), ValueError, r"weights: expected shape \(B,\)"),
            (dict(reduction="average"), ValueError, r"reduction: expected 'mean', 'sum' or 'none'"),
            (dict(transition=ALPHA_BAR), TypeError, r"transition: expected a family of vqfast.ops .*, got Tensor"),
            (dict(x0=codes.to("meta")), ValueError, r"x0: expected the device of logits, cpu, got .*meta"),
        ],
    )  # fmt: skip
    def test_loss_names_the_argument(self, change, error, words):
        with pytest.raises(error, match=words):
            self.loss(**change)

    @pytest.mark.parametrize("K", [6.0, True, "6"])
    def test_family_size(self, K):
        with pytest.raises(TypeError, match="codebook_size: expected a whole number, got (float|bool|str)"):
            Uniform(K, ALPHA_BAR)

    def test_generator(self):
        with pytest.raises(TypeError, match="generator: expected a torch.Generator or None, got int 3"):
            q_sample(self.codes, 1, TRANSITION, generator=3)

    def test_prior_kl(self):
        with pytest.raises(TypeError, match="transition: expected a family of vqfast.ops .*, got str"):
            ops.prior_kl("uniform")

    @pytest.mark.parametrize("t", [-1, 6])
    def test_q_sample_level(self, t):
        with pytest.raises(ValueError, match=r"t: expected values in 0..5 \(T = 5; 0 is data\)"):
            q_sample(self.codes, t, TRANSITION)

    def test_q_sample_codes(self):
        with pytest.raises(TypeError, match="x0: expected an int64 tensor"):
            q_sample(self.codes.float(), 1, TRANSITION)
        with pytest.raises(ValueError, match=r"x0: expected values in 0..5"):
            q_sample(self.codes + 9, 1, TRANSITION)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (dict(temperature=0), "temperature: expected a number above 0, got 0"),
            (dict(known=codes + 6), r"known: expected values in -1..5"),
            (dict(known=codes[:1]), r"known: expected shape \(B, L\)"),
            (dict(t=2, s=4), r"s: expected s < t"),
        ],
    )
    def test_p_sample(self, change, words):
        arguments = dict(logits=self.logits, x_t=self.codes, t=2, s=1, transition=TRANSITION) | change
        with pytest.raises(ValueError, match=words):
            p_sample(**arguments)

    @pytest.mark.parametrize(
        ("K", "table", "error", "words"),
        [
            (0, ALPHA_BAR, ValueError, "codebook_size: expected at least 1, got 0"),
            (4, [1.0, 0.5], TypeError, "alpha_bar: expected a floating-point tensor"),
            (4, torch.tensor([1.0]), ValueError, r"alpha_bar: expected shape \(T \+ 1,\)"),
            (4, torch.tensor([0.9, 0.5]), ValueError, "alpha_bar: expected 1 at level 0"),
            (4, torch.tensor([1.0, 0.5, 0.6]), ValueError, "never rise"),
            (4, torch.tensor([1.0, 0.0, 0.0]), ValueError, "stay above 0"),
            (4, torch.tensor([1.0, torch.nan]), ValueError, "never rise"),
        ],
    )
    def test_transition(self, K, table, error, words):
        with pytest.raises(error, match=words):
            Uniform(K, table)


@pytest.mark.skipif(registry.status("cpu")["cpu"] is not None, reason="the CPU extension is not built")
@pytest.mark.parametrize("transition", [Uniform(64, schedule("cosine", 10)), Absorbing(64, schedule("cosine", 10))])
def test_a_loss_and_its_gradient_take_the_memory_of_one_gradient(transition):
    logits = torch.randn(8, 128, 64, requires_grad=True)
    x0, t = torch.zeros(8, 128, dtype=torch.int64), torch.arange(2, 10)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(diffusion_loss(logits, x0, x0, t, transition), logits)
    large = [event.name for event in profile.events() if event.cpu_memory_usage > logits.nbytes / 2]
    assert large.count("aten::empty") == 1 and "aten::zeros" not in large and "aten::clone" not in large
