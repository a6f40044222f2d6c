"""Beyond the spec: what the posterior and its gradient do with odd scores, on every backend that runs here."""

import pytest
import torch

import vqfast
from vqfast.kernels.posterior import reference
from vqfast.ops import Absorbing, Marginal, MaskAndReplace, Uniform, posterior, registry

BACKENDS = [b for b in ("cpu", "reference") if registry.status("cpu")[b] is None]
T = 20


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    with vqfast.backend(request.param):
        yield


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def families(K: int) -> list:
    alpha = torch.linspace(1, 0, T + 1, dtype=torch.float64)
    noise = torch.rand(K, generator=seeded(9), dtype=torch.float64) ** 8
    noise[K // 2] = 0 if K > 2 else 1
    return [
        Uniform(K, alpha),
        Absorbing(K, alpha),
        MaskAndReplace(K, alpha, (1 - alpha) * 0.8),
        Marginal(noise / noise.sum(), alpha),
    ]


def problem(K: int, family, seed: int = 0):
    B, L = 4, 9
    g = seeded(seed)
    x_t = torch.randint(K + (family.mask_id is not None), (B, L), generator=g)
    if family.noise is not None and K > 2:
        x_t = torch.where(x_t == K // 2, 0, x_t)
    t = torch.tensor([1, T, 7, 12])
    return torch.randn(B, L, K, generator=g) * 3, x_t, t, torch.tensor([0, T - 1, 2, 11])


def close_where_finite(got: torch.Tensor, want: torch.Tensor, tolerance: float = 4e-6) -> None:
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("K", [1, 2, 17, 1000])
@pytest.mark.parametrize("rule", ["joint", "marginal"])
def test_the_gradient_is_that_of_the_definition(K, rule):
    for family in families(K):
        logits, x_t, t, s = problem(K, family)
        logits.requires_grad_()
        log_p = posterior(logits, x_t, t, s, family, rule=rule)
        grad = torch.randn(log_p.shape, generator=seeded(1)).where(log_p.isfinite(), 0)
        (got,) = torch.autograd.grad(log_p, logits, grad)

        wide = logits.detach().double().requires_grad_()
        exact = reference.posterior(wide, x_t, t, s, *family.tables_on(wide.device), rule == "marginal")
        (want,) = torch.autograd.grad(exact.where(log_p.isfinite(), 0), wide, grad.double())
        close_where_finite(log_p.detach(), exact.detach())
        close_where_finite(got, want, 1e-5)


@pytest.mark.parametrize("rule", ["joint", "marginal"])
def test_the_logarithm_of_a_one_hot_gives_the_true_posterior(rule):
    for family in families(33):
        _, x_t, t, s = problem(33, family)
        x0 = torch.randint(33, x_t.shape, generator=seeded(3))
        one_hot = torch.nn.functional.one_hot(x0, 33).double().log()
        # Of what a family can have noised only: a code that is kept is its own origin.
        x_t = torch.where((x_t < 33) & (family.mask_id is not None), x0, x_t)
        want = reference.posterior(one_hot, x_t, t, s, *family.tables_on(x_t.device), rule == "marginal")
        close_where_finite(posterior(one_hot.float(), x_t, t, s, family, rule=rule), want)


def test_a_vocabulary_of_words():
    family = families(50257)[0]
    logits, x_t, t, s = problem(50257, family)
    want = reference.posterior(logits.double(), x_t, t, s, *family.tables_on(x_t.device), False)
    close_where_finite(posterior(logits, x_t, t, s, family), want)


def test_the_marginal_rule_of_a_prediction_that_is_sure_of_x_t():
    """Its logit is 90 above the others, and loses 100 to the shift: the sum is that of the others."""
    noise = torch.ones(8, dtype=torch.float64)
    noise[3] = 1e-40
    family = Marginal(noise / noise.sum(), torch.linspace(1, 0, T + 1, dtype=torch.float64))
    logits = torch.zeros(1, 1, 8)
    logits[..., 3] = 90
    x_t, t, s = torch.tensor([[3]]), torch.tensor([9]), torch.tensor([8])
    want = reference.posterior(logits.double(), x_t, t, s, *family.tables_on(x_t.device), True)
    close_where_finite(posterior(logits, x_t, t, s, family, rule="marginal"), want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_row_that_is_no_distribution_spoils_no_other(dtype):
    family = families(40)[0]
    logits, x_t, t, s = problem(40, family)
    logits = logits.to(dtype)
    spoilt = logits.clone()
    spoilt[1, 2] = -torch.inf
    want, got = posterior(logits, x_t, t, s, family), posterior(spoilt, x_t, t, s, family)
    assert got[1, 2].isnan().all()
    got[1, 2] = want[1, 2]
    assert torch.equal(got, want) and want.isfinite().all()
    want, got = (
        torch.ops.vqfast.posterior_backward(
            torch.ones_like(logits), scores, x_t, t, s, *family.tables_on(x_t.device), False
        )
        for scores in (logits, spoilt)
    )
    got[1, 2] = want[1, 2]
    assert torch.equal(got, want) and want.isfinite().all()
