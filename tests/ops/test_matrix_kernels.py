"""The fused step through matrices: what it promises beyond agreeing with its definition on the specs' shapes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import vqfast
from vqfast.kernels.matrix_loss import reference as definition
from vqfast.kernels.matrix_loss import spec as loss_spec
from vqfast.kernels.matrix_sample import spec as sample_spec
from vqfast.kernels.transition_matmul.library import by_samples, chain_matrices, products_ahead
from vqfast.kernels.transition_matmul.reference import Chain
from vqfast.kernels.transition_matmul.spec import chain as random_chain
from vqfast.ops import Dense, Gaussian, Nearest, SymmetricRate, diffusion_loss, matrix_diffusion, p_sample, registry
from vqfast.ops.backends import cuda, triton

BACKENDS = [b for b in ("cpu", "reference") if registry.status("cpu")[b] is None]
K, T, B, L = 21, 9, 6, 15
G = lambda seed: torch.Generator().manual_seed(seed)
FAMILIES = {
    "gaussian": Gaussian(K, torch.linspace(0.01, 0.5, T, dtype=torch.float64), stride=3),
    "dense": Dense(torch.softmax(torch.randn(T, K, K, generator=G(0), dtype=torch.float64) * 2, dim=-1)),
    "nearest": Nearest(torch.randn(K, 3, generator=G(1)), 3, torch.linspace(0, 4, T + 1) ** 2),
}
RULES = [(name, rule) for name in FAMILIES for rule in ("joint", "marginal")[: 1 + (name != "nearest")]]
T_OF_SAMPLES = torch.tensor([1, 2, 4, 6, 9, 9])


@pytest.fixture(params=BACKENDS)
def backend(request):
    with vqfast.backend(request.param):
        yield request.param


@contextmanager
def rows_through_the_chain() -> Iterator[None]:
    """As with a codebook too large for matrices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_diffusion, "_makes_matrices", lambda *_: False)
        yield


def tokens(seed: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = G(seed)
    logits = torch.randn(B, L, K, generator=g, dtype=torch.float64) * 3
    return logits, torch.randint(K, (B, L), generator=g), torch.randint(K, (B, L), generator=g)


@pytest.mark.parametrize(("name", "rule"), RULES)
@pytest.mark.parametrize("levels", [(T_OF_SAMPLES, None), (T_OF_SAMPLES, T_OF_SAMPLES // 2), (5, None), (9, 4), (3, 0)])
def test_matrices_made_once_give_the_loss_and_gradient_of_rows_sent_through_the_chain(name, rule, levels, backend):
    logits, x0, x_t = tokens()
    t, s = levels

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        own = logits.clone().requires_grad_()
        loss = diffusion_loss(own, x0, x_t, t, FAMILIES[name], s=s, rule=rule, aux_weight=0.2, reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), own)[0]

    fused = run()
    with rows_through_the_chain():
        rows = run()
    for got, want in zip(fused, rows, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "rule"), RULES)
@pytest.mark.parametrize("levels", [(T_OF_SAMPLES, T_OF_SAMPLES // 2), (9, 4), (3, 0)])
def test_a_seed_gives_the_tokens_of_rows_sent_through_the_chain(name, rule, levels, backend):
    logits, x0, x_t = tokens()
    known = torch.where(torch.arange(L) % 4 == 0, x0, -1)
    options = dict(rule=rule, temperature=0.8, top_k=9, top_p=0.95, known=known)

    def run() -> torch.Tensor:
        return p_sample(logits, x_t, *levels, FAMILIES[name], generator=G(3), **options)

    fused = run()
    with rows_through_the_chain():
        assert torch.equal(fused, run())
    assert ((fused >= 0) & (fused < K)).all()


@pytest.mark.parametrize(
    ("name", "length", "draws", "with_gradient"),
    [
        ("dense", 4, False, True),
        ("dense", 6, False, False),
        ("gaussian", 11, True, False),
        ("nearest", 11, False, True),
    ],
)
def test_matrices_are_made_for_as_few_rows_as_pay_for_them(monkeypatch, name, length, draws, with_gradient):
    """K = 21 codes: up to 2 a row and pass through a chain, 2 a row in all where rows take two products."""
    made = []
    monkeypatch.setattr(matrix_diffusion, "_matrix_loss", lambda *_: made.append(True) or (loss, loss))
    monkeypatch.setattr(matrix_diffusion, "_matrix_sample", lambda *_: made.append(True) or x0)
    for tokens_of_sample in (length, length - 1):
        x0, loss = torch.zeros(2, tokens_of_sample, dtype=torch.int64), torch.zeros(2, tokens_of_sample)
        logits = torch.zeros(2, tokens_of_sample, K, requires_grad=with_gradient)
        t = torch.tensor([4, 9])
        if draws:
            p_sample(logits, x0, t, t - 1, FAMILIES[name], generator=G(0))
        else:
            diffusion_loss(logits, x0, x0, t, FAMILIES[name])
        assert len(made) == 1


def test_levels_as_a_number_or_as_a_tensor_give_the_same_bits(backend):
    logits, x0, x_t = tokens()
    t = torch.full((B,), 5)
    for chain in FAMILIES.values():
        losses = [diffusion_loss(logits, x0, x_t, level, chain, reduction="none") for level in (5, t)]
        drawn = [p_sample(logits, x_t, *pair, chain, generator=G(4)) for pair in ((5, 2), (t, t - 3))]
        assert torch.equal(*losses) and torch.equal(*drawn)


@pytest.mark.parametrize("marginal", [False, True])
@pytest.mark.parametrize("aux_weight", [0.0, 0.3])
def test_the_gradient_in_closed_form_is_that_of_the_definition(marginal, aux_weight):
    for shape in (dict(B=4, L=12, K=17, T=5), dict(B=3, L=12, K=23, T=5, banded=True)):
        logits, x0, x_t, s, prior, likelihood, *_ = loss_spec.inputs(shape, torch.float64, "cpu", 5)
        logits.requires_grad_()
        args = (logits, x0, x_t, s, prior, likelihood, marginal, aux_weight)
        want = torch.autograd.grad(definition.matrix_loss(*args).sum(), logits)[0]
        torch.testing.assert_close(definition.matrix_loss_grad(*args).detach(), want, rtol=1e-10, atol=1e-13)


def test_a_token_of_no_weight_is_not_read(backend):
    args = list(loss_spec.inputs(dict(B=3, L=16, K=32, T=6, marginal=True), torch.float64, "cpu", 6))
    logits, scale = args[0], args[6]
    plain = torch.ops.vqfast.matrix_loss(*args)
    args[0] = logits.masked_fill((scale == 0)[..., None], torch.nan)
    for got, want in zip(torch.ops.vqfast.matrix_loss(*args), plain, strict=True):
        assert torch.equal(got, want)


def test_scores_of_nan_show_in_their_own_token_only(backend):
    args = list(loss_spec.inputs(dict(B=2, L=16, K=32, T=6), torch.float64, "cpu", 7))
    plain = torch.ops.vqfast.matrix_loss(*args)
    args[0] = args[0].clone()
    args[0][1, 3, 5] = torch.nan
    loss, grad = torch.ops.vqfast.matrix_loss(*args)
    assert loss[1, 3].isnan() and grad[1, 3].isnan().all()
    for got, want in zip((loss, grad), plain, strict=True):
        got[1, 3] = want[1, 3]
        assert torch.equal(got, want)


def test_scores_that_are_no_distribution_leave_the_token(backend):
    args = list(sample_spec.inputs(dict(B=2, L=16, K=32, T=6), torch.float32, "cpu", 8))
    plain = torch.ops.vqfast.matrix_sample(*args)
    args[0] = args[0].clone()
    for position, value in ((3, torch.nan), (4, torch.inf), (5, -torch.inf)):
        args[0][:, position] = value
    got = torch.ops.vqfast.matrix_sample(*args)
    assert torch.equal(got[:, 3:6], args[2][:, 3:6])
    assert torch.equal(got[:, :3], plain[:, :3]) and torch.equal(got[:, 6:], plain[:, 6:])


@pytest.mark.parametrize("spec", [loss_spec.SPEC, sample_spec.SPEC], ids=lambda spec: spec.op)
def test_more_codes_than_some_kernels_hold(spec, backend):
    for shape in (dict(B=2, L=7, K=300, T=3, marginal=True, top_k=40, top_p=0.9), dict(B=1, L=3, K=1030, T=2)):
        args = spec.inputs(shape, torch.float32, "cpu", 12)
        spec.check(getattr(torch.ops.vqfast, spec.op)(*args), args)


def test_backends_say_how_many_codes_they_hold():
    loss, sample = (
        spec.inputs(dict(B=1, L=1, K=1025, T=1, top_k=3), torch.float32, "cpu", 13)
        for spec in (loss_spec.SPEC, sample_spec.SPEC)
    )
    assert "K = 1025 codes, at most 1024" in cuda.unsupported("matrix_loss", loss)
    assert "K = 1025 codes, at most 256" in triton.unsupported("matrix_loss", loss)
    assert "K = 1025 codes, at most 128" in triton.unsupported("matrix_sample", sample)


def far_apart() -> tuple[torch.Tensor, ...]:
    """s, prior and likelihood whose products are all far below the smallest float64; of two codes each."""
    prior = torch.tensor([[[1.0, 1e-220], [1e-220, 1.0]]], dtype=torch.float64)
    likelihood = torch.tensor([[[1e-230, 1e-300], [1.0, 1e-200]]], dtype=torch.float64)
    return torch.tensor([3]), prior, likelihood


def test_posteriors_of_products_that_underflow(backend):
    """f_j q_j of 1e-230 and 1e-520: the posterior is a ratio, and has all of its digits."""
    logits = torch.tensor([[[0.0, -600.0]]], dtype=torch.float64)
    zero, one = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.float64)
    s, prior, likelihood = far_apart()
    args = (logits, zero, zero, s, prior, likelihood, one, False, 0.0, True)
    loss, _ = torch.ops.vqfast.matrix_loss(*args)
    loss_spec.check((loss, torch.ops.vqfast.matrix_loss(*args)[1]), args)
    # Code 1 in the data, seen as code 0: shares 1e-220 * 1e-230 and 1 * 1e-300, against 1e-230 and 1e-220 * 1e-300.
    args = (logits, zero + 1, zero, s, prior, likelihood, one, False, 0.0, True)
    loss, _ = torch.ops.vqfast.matrix_loss(*args)
    torch.testing.assert_close(loss.item(), (520 - 230) * 2.302585092994046, rtol=1e-12, atol=0)


def test_an_impossible_pair_has_no_loss_and_stays(backend):
    """q(x_t | x_s) and q(x_s | x_0) that share no code."""
    prior = torch.eye(3, dtype=torch.float64)[None]
    likelihood = torch.eye(3, dtype=torch.float64)[None]
    logits = torch.tensor([[[0.0, -torch.inf, -torch.inf]]], dtype=torch.float64)
    x0, x_t = torch.tensor([[0]]), torch.tensor([[2]])
    one = torch.ones(1, 1, dtype=torch.float64)
    for s in (0, 3):
        args = (logits, x0, x_t, torch.tensor([s]), prior, likelihood)
        loss, grad = torch.ops.vqfast.matrix_loss(*args, one, False, 0.0, True)
        assert loss.isnan().all() and grad.isnan().all()
        args = (logits, None, x_t, torch.tensor([s]), prior, likelihood, None, False, 1.0, 1.0, 0, 1.0)
        assert torch.ops.vqfast.matrix_sample(*args, torch.tensor([1, 2])).item() == 2


def test_codes_out_of_range_are_named(backend):
    args = list(loss_spec.inputs(dict(B=2, L=3, K=4, T=3), torch.float32, "cpu", 9))
    args[1] = args[1] + 4
    with pytest.raises(ValueError, match=r"x0: expected values in 0..3 \(K = 4\)"):
        torch.ops.vqfast.matrix_loss(*args)
    args = list(sample_spec.inputs(dict(B=2, L=3, K=4, T=3, known=True), torch.float32, "cpu", 9))
    args[6] = args[6] + 4
    with pytest.raises(ValueError, match=r"known: expected values in -1..3"):
        torch.ops.vqfast.matrix_sample(*args)


def test_a_loss_can_be_gone_back_through_twice(backend):
    logits, x0, x_t = tokens()
    logits.requires_grad_()
    loss = diffusion_loss(logits, x0, x_t, 5, FAMILIES["gaussian"])
    first = torch.autograd.grad(loss, logits, 3 * torch.ones(()), retain_graph=True)[0]
    second = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(first, 3 * second)


class TestMatricesOfAChain:
    @pytest.mark.parametrize("banded", [False, True])
    @pytest.mark.parametrize("size", [1, 2, 7, 12])
    def test_products_shared_between_samples_and_halves_are_those_of_the_definition(self, banded, size):
        steps, diagonal = random_chain(dict(K=size, T=11, banded=banded), torch.float64, "cpu", 10)
        chain = Chain(steps, diagonal, *products_ahead(steps, diagonal, 4), 4)
        for from_data in (True, False):
            pairs = [(s, t) for t in range(12) for s in range(t + 1) if not from_data or s == 0]
            for (s, t), got in chain_matrices(pairs + pairs, chain, from_data):
                want = torch.eye(size, dtype=torch.float64)
                for level in range(s, t):
                    want = want @ chain.step(level)
                torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-300)

    def test_samples_whose_products_begin_alike_share_them(self, monkeypatch):
        """Levels 5, 6, 7 and 7 of a chain with products at 4: three steps in all."""
        made = []
        step = Chain.step
        monkeypatch.setattr(Chain, "step", lambda self, index: made.append(index) or step(self, index))
        steps, diagonal = random_chain(dict(K=6, T=11, banded=True), torch.float64, "cpu", 11)
        chain = Chain(steps, diagonal, *products_ahead(steps, diagonal, 4), 4)
        by_samples(torch.arange(6).expand(4, 6), None, torch.tensor([7, 5, 7, 6]), chain, False, 0)
        assert made == [4, 5, 6]

    def test_a_band_is_itself_after_half_a_turn(self):
        steps, diagonal, cumulative, blocks = FAMILIES["gaussian"].tables_on(torch.device("cpu"))
        for table in (diagonal, cumulative, blocks):
            turned = table.flip(tuple(range(1, table.ndim)))
            torch.testing.assert_close(table, turned, rtol=1e-14, atol=0)

    def test_a_rate_s_matrices_have_no_entry_below_zero(self):
        chain: SymmetricRate = FAMILIES["nearest"]
        codes = torch.arange(K).expand(T, K)
        assert (chain.product(codes, None, torch.arange(1, T + 1)) >= 0).all()
