"""Families through matrices against products of one-step matrices, written down from the papers and enumerated."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import vqfast
from vqfast.diffusion.schedules import gaussian_betas, schedule
from vqfast.kernels.transition_matmul.library import factors
from vqfast.ops import (
    Absorbing,
    Dense,
    Gaussian,
    Marginal,
    MaskAndReplace,
    Nearest,
    SymmetricRate,
    Transition,
    Uniform,
    diffusion_loss,
    neighbour_rate,
    p_sample,
    posterior,
    prior_kl,
    q_sample,
    registry,
    transition_matmul,
)
from vqfast.ops.matrix_transitions import default_stride

BACKENDS = [b for b in ("cpu", "reference") if registry.status("cpu")[b] is None]
K, T = 5, 7
BETAS = torch.tensor([0.02, 0.3, 0.05, 0.6, 1.5, 0.2, 3.0], dtype=torch.float64)
TIMES = torch.tensor([0.0, 0.1, 0.25, 0.25, 0.6, 1.5, 2.0, 6.0], dtype=torch.float64)
COSINE = schedule("cosine", T)
STEPS = [(1, 0), (5, 2), (7, 6), (7, 1)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


EMBEDDINGS = torch.randn(K, 3, generator=seeded(4), dtype=torch.float64)
MATRICES = torch.softmax(torch.randn(T, K, K, generator=seeded(5), dtype=torch.float64) * 2, dim=-1)


def rate() -> torch.Tensor:
    """Two nearest neighbours, by loops."""
    R = torch.zeros(K, K, dtype=torch.float64)
    for i in range(K):
        distance = (EMBEDDINGS - EMBEDDINGS[i]).square().sum(1)
        distance[i] = torch.inf
        for j in distance.argsort()[:2].tolist():
            R[i, j] += 1 / 4
            R[j, i] += 1 / 4
    return R - R.sum(1).diag()


def gaussian_step(beta: float, size: int) -> torch.Tensor:
    """D3PM, appendix A.2.3, entry by entry."""
    weight = lambda d: torch.tensor(-((2 * d / (size - 1)) ** 2) / beta, dtype=torch.float64).exp()
    total = sum(weight(d) for d in range(1 - size, size))
    Q = torch.tensor([[weight(i - j) / total if i != j else 0.0 for j in range(size)] for i in range(size)])
    return Q.double() + (1 - Q.double().sum(1)).diag()


FAMILIES = {
    "gaussian": Gaussian(K, BETAS, stride=3),
    "dense": Dense(MATRICES),
    "nearest": Nearest(EMBEDDINGS, 2, TIMES),
}
ONE_STEP = {
    "gaussian": [gaussian_step(float(beta), K) for beta in BETAS],
    "dense": list(MATRICES),
    "nearest": [torch.linalg.matrix_exp(float(TIMES[t + 1] - TIMES[t]) * rate()) for t in range(T)],
}


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request):
    with vqfast.backend(request.param):
        yield request.param


def between(name: str, s: int, t: int) -> torch.Tensor:
    product = torch.eye(K, dtype=torch.float64)
    for step in ONE_STEP[name][s:t]:
        product = product @ step
    return product


def enumerated(name: str, p: torch.Tensor, x_t: int, t: int, s: int, rule: str) -> torch.Tensor:
    """p(x_s | x_t) for p (..., K) of x_0, by summing over all x_0."""
    joint = between(name, 0, s) * between(name, s, t)[:, x_t]  # (x_0, x_s)
    given = joint.sum(1, keepdim=True)
    if rule == "joint":
        product = p @ joint
        return product / product.sum(-1, keepdim=True)
    weight = p * (given[:, 0] > 0)
    return (weight / weight.sum(-1, keepdim=True)) @ (joint / given.clamp(min=1e-300))


def possible(name: str, t: int, x0: int) -> list[int]:
    return (between(name, 0, t)[x0] > 1e-13).nonzero()[:, 0].tolist()


def rules(name: str) -> tuple[str, ...]:
    return ("joint",) if isinstance(FAMILIES[name], SymmetricRate) else ("joint", "marginal")


class TestChain:
    def test_rows_are_those_of_the_product_of_all_steps(self, name, backend):
        p = torch.rand(T + 1, 4, K, generator=seeded(), dtype=torch.float64)
        got = transition_matmul(p, torch.arange(T + 1), FAMILIES[name])
        want = torch.stack([p[t] @ between(name, 0, t) for t in range(T + 1)])
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
        assert torch.equal(got[0], p[0])

    @pytest.mark.parametrize("stride", range(1, T + 1))
    def test_the_stride_changes_no_result(self, stride):
        p, t = torch.rand(T + 1, 4, K, generator=seeded(), dtype=torch.float64), torch.arange(T + 1)
        want = transition_matmul(p, t, FAMILIES["gaussian"])
        got = transition_matmul(p, t, Gaussian(K, BETAS, stride=stride))
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)

    def test_a_rate_is_that_of_its_neighbours(self):
        p, t = torch.rand(T + 1, 4, K, generator=seeded(), dtype=torch.float64), torch.arange(T + 1)
        got = transition_matmul(p, t, SymmetricRate(rate(), TIMES))
        torch.testing.assert_close(got, transition_matmul(p, t, FAMILIES["nearest"]), rtol=1e-13, atol=1e-14)

    def test_small_probabilities_of_a_band_are_right_too(self):
        """Each entry is a sum of numbers that are not negative: 1e-30 comes with as many digits as 1."""
        chain = Gaussian(40, torch.full((9,), 0.003, dtype=torch.float64), stride=3)
        codes = torch.arange(40)[None]
        step = gaussian_step(0.003, 40)
        want = torch.linalg.matrix_power(step, 8)
        got = chain.product(codes, None, torch.tensor([8]))[0]
        assert want.min() < 1e-70
        torch.testing.assert_close(got, want, rtol=1e-11, atol=0)

    def test_steps_between_any_two_levels_and_their_transposes(self, name, backend):
        pairs = [(s, t) for t in range(T + 1) for s in range(t + 1)]
        s, t = torch.tensor(pairs).unbind(1)
        codes = torch.arange(K).expand(len(pairs), K).contiguous()
        for transpose in (False, True):
            want = torch.stack([between(name, *pair) for pair in pairs])
            got = FAMILIES[name].product(codes, s, t, transpose=transpose)
            torch.testing.assert_close(got, want.mT if transpose else want, rtol=1e-13, atol=1e-14)

    def test_rows_sum_to_one_and_so_do_columns_where_the_family_says_so(self, name):
        codes = torch.arange(K).expand(T + 1, K).contiguous()
        Q = FAMILIES[name].product(codes, None, torch.arange(T + 1))
        torch.testing.assert_close(Q.sum(2), torch.ones(T + 1, K, dtype=torch.float64), rtol=0, atol=1e-14)
        assert (Q >= 0).all()
        if name != "dense":
            torch.testing.assert_close(Q.sum(1), torch.ones(T + 1, K, dtype=torch.float64), rtol=0, atol=1e-14)

    def test_the_gradient_is_the_transposed_product(self, name, backend):
        p = torch.rand(3, 2, K, generator=seeded(), dtype=torch.float64, requires_grad=True)
        t = torch.tensor([0, 4, 7])
        assert torch.autograd.gradcheck(lambda p: transition_matmul(p, t, FAMILIES[name]), p)

    def test_dtype_is_that_of_the_rows(self, name):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            p = torch.rand(2, 3, K, generator=seeded()).to(dtype)
            got = transition_matmul(p, 5, FAMILIES[name])
            want = transition_matmul(p.double(), 5, FAMILIES[name]).to(dtype)
            assert got.dtype == dtype and torch.equal(got, want)

    @pytest.mark.parametrize("stride", [1, 2, 3, 5, 7])
    def test_factors_lead_from_one_level_to_the_other(self, stride):
        for t in range(T + 1):
            for s in range(t + 1):
                for from_data in {False, s == 0}:
                    level = s
                    for table, i in factors(s, t, stride, from_data):
                        first = {"cumulative": 0, "blocks": i * stride, "steps": i}[table]
                        assert first == level
                        level = i + 1 if table == "steps" else (i + 1) * stride
                    assert level == t

    @pytest.mark.parametrize(
        "chain",
        [
            Uniform(K, torch.tensor([1.0, 0.6, 0.2])),
            Absorbing(K, torch.tensor([1.0, 0.6, 0.2])),
            MaskAndReplace(K, torch.tensor([1.0, 0.6, 0.2]), torch.tensor([0.0, 0.3, 0.7])),
            Marginal(torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0]), torch.tensor([1.0, 0.6, 0.2])),
        ],
        ids=lambda chain: type(chain).__name__,
    )
    def test_closed_forms_too(self, chain: Transition):
        p = torch.rand(3, 4, K, generator=seeded(), dtype=torch.float64, requires_grad=True)
        t = torch.tensor([0, 1, 2])
        noise = torch.full((K,), 1 / K, dtype=torch.float64) if chain.noise is None else chain.noise
        for b in range(3):
            alpha, mask = chain.alpha_bar[b], chain.mask_bar[b]
            Q = alpha * torch.eye(K, dtype=torch.float64) + (1 - alpha - mask) * noise
            Q = Q if chain.mask_id is None else torch.cat([Q, mask.expand(K, 1)], dim=1)
            torch.testing.assert_close(transition_matmul(p, t, chain)[b], p[b] @ Q, rtol=1e-13, atol=1e-14)
        assert torch.autograd.gradcheck(lambda p: transition_matmul(p, t, chain), p)

    def test_prior_is_uniform_where_doubly_stochastic_and_its_kl_that_of_the_last_rows(self, name):
        chain, Q = FAMILIES[name], between(name, 0, T)
        torch.testing.assert_close(chain.prior(), Q.mean(0), rtol=0, atol=1e-14)
        torch.testing.assert_close(prior_kl(chain), (Q * (Q / Q.mean(0)).log()).sum(1), rtol=1e-9, atol=1e-14)

    @pytest.mark.parametrize("size", [64, pytest.param(256, marks=pytest.mark.slow)])
    def test_no_stack_of_matrices_is_made(self, size):
        """T = 1000 matrices would be T K^2 numbers: a quarter of that is kept, and a call makes far less."""
        chain = Gaussian(size, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
        stack = 1000 * size**2 * 8
        assert sum(table.numel() * 8 for table in chain.tables_on(torch.device("cpu"))) < stack / 3.5
        x0, t = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([999, 17])
        for run in (
            lambda: transition_matmul(torch.rand(2, 3, size), t, chain),
            lambda: q_sample(x0, t, chain),
            lambda: p_sample(torch.zeros(2, 3, size), x0, t, t - 10, chain),
        ):
            with torch.profiler.profile(profile_memory=True) as profile:
                run()
            # A few matrices written out at a time.
            assert max(abs(event.cpu_memory_usage) for event in profile.events()) < 8 * size**2 * 8

    def test_products_are_kept_as_far_apart_as_memory_asks(self):
        assert [default_stride(1000, K) for K in (16, 256, 362, 1024)] == [8, 8, 16, 31]
        assert [default_stride(T, 16) for T in (1, 3, 10, 100)] == [1, 1, 3, 8]


def test_bands_of_the_published_schedule_reach_as_far_as_the_notes_say():
    """kernels/transition_matmul/README.md: why a product does not skip what lies outside a band."""
    betas = gaussian_betas(1000)[[0, 265, 266, 999]]
    steps = Gaussian(256, betas).tables_on(torch.device("cpu"))[0]
    # Wider steps have fewer zeros: the last 734 of 1000 have none.
    assert (steps[:, 1:] == 0).any(1).tolist() == [True, True, False, False]
    assert float(steps[-1, 85] / steps[-1, 1]) == pytest.approx(2.2e-10, rel=0.02)


class TestOps:
    def test_forward_draws_have_the_marginals(self, name, backend):
        n = 20_000
        for t in (0, 2, 3, 7):
            x_t = q_sample(torch.full((1, n), 1), t, FAMILIES[name], generator=seeded(t))
            want = between(name, 0, t)[1]
            counts = torch.bincount(x_t[0], minlength=K).double()
            assert ((counts - want * n).abs() <= 6 * (n * want * (1 - want)).sqrt() + 1e-6).all()

    @pytest.mark.parametrize(("t", "s"), STEPS)
    def test_posterior_is_the_sum_over_x0(self, name, backend, t, s):
        logits = torch.randn(1, 1, K, generator=seeded(), dtype=torch.float64) * 2
        for rule in rules(name):
            for x_t in {x for k in range(K) for x in possible(name, t, k)}:
                want = enumerated(name, logits[0, 0].softmax(-1), x_t, t, s, rule)
                for levels in ((t, s), (torch.tensor([t]), torch.tensor([s]))):
                    got = posterior(logits, torch.tensor([[x_t]]), *levels, FAMILIES[name], rule=rule)
                    torch.testing.assert_close(got[0, 0].exp(), want, rtol=1e-10, atol=1e-13)

    @pytest.mark.parametrize(("t", "s"), STEPS)
    def test_loss_is_the_divergence_of_the_posteriors(self, name, backend, t, s):
        logits = torch.randn(1, 1, K, generator=seeded(), dtype=torch.float64) * 2
        for rule in rules(name):
            for x0 in range(K):
                for x_t in possible(name, t, x0):
                    true = enumerated(name, torch.eye(K, dtype=torch.float64)[x0], x_t, t, s, "joint")
                    model = enumerated(name, logits[0, 0].softmax(-1), x_t, t, s, rule)
                    want = torch.special.xlogy(true, true / model).where(true > 0, 0).sum()
                    want = want - 0.1 * logits[0, 0].log_softmax(-1)[x0]
                    got = diffusion_loss(
                        logits, torch.tensor([[x0]]), torch.tensor([[x_t]]), t, FAMILIES[name], s=s, rule=rule,
                        aux_weight=0.1,
                    )  # fmt: skip
                    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)

    def test_loss_gradient(self, name, backend):
        x0 = torch.tensor([[0, 1], [2, 3], [4, 0]])
        t = torch.tensor([1, 4, 7])
        x_t = q_sample(x0, t, FAMILIES[name], generator=seeded())
        logits = torch.randn(3, 2, K, generator=seeded(), dtype=torch.float64, requires_grad=True)
        for rule in rules(name):
            loss = lambda x, rule=rule: diffusion_loss(x, x0, x_t, t, FAMILIES[name], rule=rule, aux_weight=0.3)
            assert torch.autograd.gradcheck(loss, logits)

    def test_tokens_that_do_not_count_are_not_read_and_the_others_are_weighed(self, name):
        x0 = torch.tensor([[0, 1, 2], [3, 4, 0]])
        logits = torch.randn(2, 3, K, generator=seeded(), dtype=torch.float64)
        weights, mask = torch.tensor([0.5, 2.0]), torch.tensor([[True, False, True], [True, True, False]])
        plain = diffusion_loss(logits, x0, x0, 5, FAMILIES[name], reduction="none")
        logits[~mask] = torch.nan
        logits.requires_grad_()
        got = diffusion_loss(logits, x0, x0, 5, FAMILIES[name], weights=weights, mask=mask)
        want = (plain * weights[:, None])[mask].sum() / mask.sum()
        torch.testing.assert_close(got, want)
        got.backward()
        assert logits.grad.isfinite().all() and (logits.grad[~mask] == 0).all()

    def test_scores_too_low_for_an_exponential_have_a_loss(self, name):
        """At s = 0 the loss is a logarithm of p, not of a product that underflows."""
        logits = torch.tensor([[[0.0, -2000.0, -2000.0, -2000.0, -2000.0]]], dtype=torch.float64, requires_grad=True)
        code = torch.tensor([[1]])
        loss = diffusion_loss(logits, code, code, 7, FAMILIES[name], s=0)
        loss.backward()
        assert 1900 < loss < 2100 and logits.grad.isfinite().all()

    @pytest.mark.parametrize(("t", "s"), STEPS)
    def test_reverse_draws_follow_the_posterior(self, name, backend, t, s):
        n, logits = 10_000, torch.randn(K, generator=seeded(), dtype=torch.float64)
        for rule in rules(name):
            rows = torch.full((1, n), 2)
            drawn = p_sample(
                logits.expand(1, n, K), rows, t, s, FAMILIES[name], rule=rule, temperature=0.8, generator=seeded(t)
            )
            want = enumerated(name, (logits / 0.8).softmax(-1), 2, t, s, rule)
            counts = torch.bincount(drawn[0], minlength=K).double()
            assert ((counts - want * n).abs() <= 6 * (n * want * (1 - want)).sqrt() + 1e-6).all()

    def test_reverse_draws_with_truncation_guidance_and_known_tokens(self, name):
        n, g = 10_000, seeded(2)
        logits, other = (torch.randn(K, generator=g, dtype=torch.float64) for _ in range(2))
        known = torch.where(torch.arange(n) % 2 == 0, 3, -1)[None]
        drawn = p_sample(
            logits.expand(1, n, K), torch.full((1, n), 2), 7, 4, FAMILIES[name], top_k=3, guidance=1.5,
            unconditional=other.expand(1, n, K), known=known, generator=seeded(3),
        )[0]  # fmt: skip
        p = (other + 1.5 * (logits - other)).softmax(-1)
        p = p.where(p >= p.topk(3).values[-1], 0)
        wants = between(name, 0, 4)[3], enumerated(name, p / p.sum(), 2, 7, 4, "joint")
        for part, want in zip((drawn[::2], drawn[1::2]), wants, strict=True):
            counts, m = torch.bincount(part, minlength=K).double(), n // 2
            assert ((counts - want * m).abs() <= 6 * (m * want * (1 - want)).sqrt() + 1e-6).all()
        given = p_sample(torch.zeros(1, n, K), torch.full((1, n), 2), 3, 0, FAMILIES[name], known=known)[0]
        assert (given[::2] == 3).all()

    def test_a_seed_gives_the_same_tokens_on_every_backend(self, name):
        x0 = torch.randint(K, (4, 300), generator=seeded())
        t, logits = torch.tensor([1, 3, 6, 7]), torch.randn(4, 300, K, generator=seeded())
        drawn = []
        for backend in BACKENDS:
            with vqfast.backend(backend):
                x_t = q_sample(x0, t, FAMILIES[name], generator=seeded(1))
                drawn.append((x_t, p_sample(logits, x_t, t, t - 1, FAMILIES[name], generator=seeded(2))))
        assert all(torch.equal(a, b) for pair in drawn for a, b in zip(pair, drawn[0], strict=True))

    def test_scores_of_nan_leave_the_token(self, name):
        x_t = torch.arange(10).view(2, 5) % K
        assert torch.equal(p_sample(torch.full((2, 5, K), torch.nan), x_t, 4, 2, FAMILIES[name]), x_t)

    @pytest.mark.parametrize("name", ["gaussian", "nearest"])
    def test_compiles_without_a_break_and_without_a_recompile_for_another_batch(self, name):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        chain = FAMILIES[name]

        @torch.compile(backend=counter, fullgraph=True, dynamic=True)
        def step(logits, x0, t):
            x_t = q_sample(x0, t, chain)
            return diffusion_loss(logits, x0, x_t, t, chain), p_sample(logits, x_t, t, 0, chain), x_t

        compiled = []
        for batch in (3, 9):
            logits = torch.randn(batch, 7, K, requires_grad=True)
            x0, t = torch.randint(K, (batch, 7)), torch.randint(1, T + 1, (batch,))
            loss, x_s, x_t = step(logits, x0, t)
            loss.backward()
            copy = logits.detach().requires_grad_()
            eager = diffusion_loss(copy, x0, x_t, t, chain)
            eager.backward()
            torch.testing.assert_close(loss, eager)
            torch.testing.assert_close(logits.grad, copy.grad)
            assert x_s.shape == x0.shape
            compiled.append(counter.frame_count)
        assert len(set(compiled)) == 1


class TestTimesLikeUniform:
    def every_row(self, transition: Transition, t: int) -> torch.Tensor:
        return transition_matmul(torch.eye(transition.codebook_size, dtype=torch.float64)[None], t, transition)[0]

    def test_jumps_to_any_code_are_uniform_noise(self):
        anywhere = torch.ones(K, K, dtype=torch.float64) - K * torch.eye(K, dtype=torch.float64)
        family, uniform = SymmetricRate(anywhere, alpha_bar=COSINE), Uniform(K, COSINE)
        for t in range(T + 1):
            expected = COSINE[t] * torch.eye(K, dtype=torch.float64) + (1 - COSINE[t]) / K
            torch.testing.assert_close(self.every_row(family, t), expected, rtol=0, atol=1e-11)
            torch.testing.assert_close(transition_matmul(torch.eye(K).double()[None], t, uniform)[0], expected)

    def test_a_token_is_what_it_was_as_often_as_under_uniform_noise(self):
        codebook = torch.randn(40, 3, generator=seeded(), dtype=torch.float64)
        family = Nearest(codebook, 5, alpha_bar=COSINE)
        assert family.groups == 1
        stays = [self.every_row(family, t).diagonal().mean().item() for t in range(T + 1)]
        assert stays == pytest.approx((COSINE + (1 - COSINE) / 40).tolist(), abs=1e-11)
        assert prior_kl(family).max() < 1e-9

    def test_groups_that_no_token_leaves_are_counted_and_mix_each_for_itself(self):
        near = torch.randn(12, 3, generator=seeded(), dtype=torch.float64)
        family = Nearest(torch.cat([near[:8], near[8:] + 100]), 3, alpha_bar=COSINE)
        assert family.groups == 2
        expected = torch.block_diag(torch.full((8, 8), 1 / 8), torch.full((4, 4), 1 / 4)).double()
        torch.testing.assert_close(self.every_row(family, T), expected, rtol=0, atol=1e-7)

    def test_one_code(self):
        assert self.every_row(SymmetricRate(torch.zeros(1, 1), alpha_bar=COSINE), T).tolist() == [[1.0]]


class TestErrors:
    codes = torch.zeros(2, 3, dtype=torch.int64)

    @pytest.mark.parametrize(
        ("make", "error", "words"),
        [
            (lambda: Gaussian(1, BETAS), ValueError, "codebook_size: expected at least 2, got 1"),
            (lambda: Gaussian(K, BETAS.tolist()), TypeError, "betas: expected a floating-point tensor"),
            (lambda: Gaussian(K, -BETAS), ValueError, "betas: expected finite numbers above 0"),
            (lambda: Gaussian(K, BETAS[None]), ValueError, r"betas: expected shape \(T,\)"),
            (lambda: Gaussian(K, BETAS, stride=8), ValueError, r"stride: expected a whole number of levels in 1..7"),
            (lambda: Dense(MATRICES[0]), ValueError, r"matrices: expected shape \(T, K, K\)"),
            (lambda: Dense(MATRICES * 0.9), ValueError, "matrices: expected probabilities in rows of sum 1"),
            (lambda: Dense(MATRICES - 0.5), ValueError, "matrices: expected probabilities in rows of sum 1"),
            (lambda: Dense(MATRICES.long()), TypeError, "matrices: expected a floating-point tensor"),
            (lambda: SymmetricRate(MATRICES[0], TIMES), ValueError, "rate: expected a symmetric matrix"),
            (lambda: SymmetricRate(rate(), TIMES + 1), ValueError, "times: expected 0 at level 0"),
            (lambda: SymmetricRate(rate(), TIMES[:1]), ValueError, r"times: expected shape \(T \+ 1,\)"),
            (lambda: SymmetricRate(rate()), TypeError, "times, alpha_bar: expected one of them, got none"),
            (lambda: SymmetricRate(rate(), TIMES, alpha_bar=COSINE), TypeError, "times, alpha_bar: .* got both"),
            (lambda: SymmetricRate(rate(), alpha_bar=TIMES), ValueError, "alpha_bar: expected 1 at level 0"),
            (lambda: Nearest(EMBEDDINGS, 5, TIMES), ValueError, r"neighbours: expected a whole number in 1..4 \(K = 5"),
            (lambda: Gaussian(K + 0.5, BETAS), TypeError, "codebook_size: expected a whole number, got float 5.5"),
            (lambda: neighbour_rate(EMBEDDINGS), TypeError, "neighbours: expected an int64 tensor"),
            (lambda: neighbour_rate(torch.full((K, 2), K)), ValueError, r"neighbours: expected codes in 0\.\.K - 1"),
            (lambda: Nearest(EMBEDDINGS * torch.nan, 2, TIMES), ValueError, "embeddings: expected finite values"),
        ],
    )
    def test_tables(self, make, error, words):
        with pytest.raises(error, match=words):
            make()

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (dict(logits=torch.zeros(2, 3, 6)), ValueError, r"logits: expected K = 5 of .*codebook_size=5, T=7"),
            (dict(x_t=codes + 5), ValueError, r"x_t: expected values in 0..4 \(K = 5\), got 5..5"),
            (dict(x0=codes - 1), ValueError, r"x0: expected values in 0..4"),
            (dict(t=8), ValueError, r"t: expected values in 1..7 \(T = 7\), got 8..8"),
            (dict(t=3, s=3), ValueError, "s: expected s < t in every sample"),
            (dict(x0=codes.int()), TypeError, "x0: expected an int64 tensor"),
        ],
    )
    def test_loss(self, name, change, error, words):
        arguments = dict(logits=torch.zeros(2, 3, K), x0=self.codes, x_t=self.codes, t=2, transition=FAMILIES[name])
        with pytest.raises(error, match=words):
            diffusion_loss(**arguments | change)

    def test_transition_matmul(self, name):
        with pytest.raises(ValueError, match="p: expected K = 5 of"):
            transition_matmul(torch.zeros(1, 2, 6), 1, FAMILIES[name])
        with pytest.raises(ValueError, match=r"t: expected values in 0..7 \(T = 7; 0 is data\), got 8..8"):
            transition_matmul(torch.zeros(1, 2, K), 8, FAMILIES[name])
        with pytest.raises(TypeError, match="p: expected a float64"):
            transition_matmul(torch.zeros(1, 2, K).long(), 1, FAMILIES[name])
        with pytest.raises(TypeError, match="transition: expected a family of vqfast.ops .*Gaussian"):
            transition_matmul(torch.zeros(1, 2, K), 1, MATRICES)

    def test_the_marginal_rule_of_a_basis_is_refused_with_a_way_out(self):
        with pytest.raises(ValueError, match=r"rule: expected 'joint' for Nearest.*vqfast.ops.Dense take both rules"):
            posterior(torch.zeros(2, 3, K), self.codes, 2, 1, FAMILIES["nearest"], rule="marginal")

    def test_nan_logits_are_named_where_values_are_checked(self, name):
        logits = torch.zeros(2, 3, K)
        logits[1, 2, 3] = torch.nan
        for call in (
            lambda: diffusion_loss(logits, self.codes, self.codes, 2, FAMILIES[name]),
            lambda: p_sample(logits, self.codes, 2, 1, FAMILIES[name]),
        ):
            expected = r"logits: expected no NaN, got NaN in 1 tokens, the first at \[1, 2\]"
            with vqfast.checked(), pytest.raises(ValueError, match=expected):
                call()
