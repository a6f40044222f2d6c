"""The process and the sampler on every transition family: what holds for uniform noise holds for all."""

import math

import pytest
import torch

from vqfast.diffusion import (
    Absorbing,
    DiscreteDiffusion,
    Marginal,
    MaskAndReplace,
    Uniform,
    mask_and_replace,
    prior_kl,
    sample,
    schedule,
)
from vqfast.diffusion.sampler import draw_prior
from vqfast.ops import diffusion_loss

K, T = 5, 12
SHARES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625], dtype=torch.float64)
ALPHA = schedule("cosine", T)
CHAINS = {
    "uniform": Uniform(K, ALPHA),
    "absorbing": Absorbing(K, ALPHA),
    "mask_and_replace": MaskAndReplace(K, ALPHA, 0.6 * (1 - ALPHA)),
    "marginal": Marginal(SHARES.flip(0), ALPHA),
}


@pytest.fixture(params=CHAINS)
def chain(request):
    return CHAINS[request.param]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_logits(logits):
    return lambda x_t, t, labels: logits.expand(*x_t.shape, -1)


def random_denoiser(states):
    table = torch.randn(T + 1, states, K, generator=seeded(3), dtype=torch.float64)
    return lambda x_t, t, labels: table[t[:, None], x_t]


def assert_shares(codes, expected):
    n = codes.numel()
    share = torch.bincount(codes.flatten(), minlength=len(expected)).double() / n
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1e-12).all(), share


def exact_bound(p: DiscreteDiffusion, denoiser, x0: int) -> float:
    """Bits: every term of the bound, summed over all values of x_t of a single token."""
    chain, total = p.transition, prior_kl(p.transition)[x0].item()
    noise = torch.full((K,), 1 / K, dtype=torch.float64) if chain.noise is None else chain.noise
    clean = torch.tensor([[x0]])
    for t in range(1, T + 1):
        for state in range(chain.states):
            if state == chain.mask_id:
                q = chain.mask_bar[t].item()
            else:
                replaced = 1 - chain.alpha_bar[t] - chain.mask_bar[t]
                q = (chain.alpha_bar[t] * (state == x0) + replaced * noise[state]).item()
            if q <= 1e-12:
                continue
            x_t, level = torch.tensor([[state]]), torch.tensor([t])
            logits = p.predict(denoiser, x_t, level)
            total += q * diffusion_loss(logits, clean, x_t, level, chain, rule=p.rule, reduction="sum").item()
    return total / math.log(2)


@pytest.mark.parametrize("rule", ["joint", "marginal"])
@pytest.mark.parametrize("parameterisation", ["x0", "residual"])
def test_the_objective_is_an_unbiased_estimate_of_the_bound(chain, rule, parameterisation):
    p = DiscreteDiffusion(chain, rule=rule, parameterisation=parameterisation).eval()
    denoiser = random_denoiser(chain.states)
    exact = exact_bound(p, denoiser, 1)
    g = seeded()
    x0 = torch.ones(6000, 1, dtype=torch.int64)
    estimates = torch.stack([p(denoiser, x0, generator=g).bits_per_dim for _ in range(20)])
    error = estimates.std() / math.sqrt(20)
    assert abs(estimates.mean() - exact) < 5 * error < 0.1 * exact


@pytest.mark.parametrize("rule", ["joint", "marginal"])
@pytest.mark.parametrize("steps", [None, 5, 1])
def test_the_bound_of_the_true_model_is_the_entropy(chain, rule, steps):
    """What the data are, given x_t: by Bayes the joint rule's prediction is the data's own distribution, whatever x_t;
    the marginal rule's is the posterior of x_0.
    """
    n = 20_000
    x0 = torch.multinomial(SHARES, n, replacement=True, generator=seeded())[:, None]
    noise = torch.full((K,), 1 / K, dtype=torch.float64) if chain.noise is None else chain.noise

    def denoiser(x_t, t, labels):
        logits = SHARES.log().expand(*x_t.shape, -1)
        if rule == "joint":
            return logits
        alpha, mask = chain.alpha_bar[t][:, None, None], chain.mask_bar[t][:, None, None]
        code = x_t.clamp(max=K - 1)[..., None]
        likelihood = alpha * (torch.arange(K) == code) + (1 - alpha - mask) * noise[code]
        return logits + torch.where(x_t[..., None] == K, 0.0, likelihood.clamp(min=1e-300).log())

    p = DiscreteDiffusion(chain, rule=rule)
    bits = p.bits_per_dim(denoiser, x0, steps=steps, generator=seeded(1))
    entropy = -(SHARES * SHARES.log2()).sum().item()
    assert abs(bits.mean() - entropy) < 5 * bits.std() / math.sqrt(n) + 1e-9
    codes = sample(denoiser, (4000, 3), chain, steps=steps, rule=rule, generator=seeded(2))
    assert_shares(codes, SHARES)


def test_sampling_starts_from_the_prior(chain):
    x = draw_prior((200, 300), chain, generator=seeded())
    assert_shares(x, chain.prior())


def test_known_codes_come_out_as_they_went_in(chain):
    known = torch.randint(-1, K, (64, 9), generator=seeded())
    codes = sample(same_logits(SHARES.log()), (64, 9), chain, steps=4, known=known, generator=seeded(1))
    assert torch.equal(codes[known >= 0], known[known >= 0])
    assert codes.min() >= 0 and codes.max() < K


def test_a_masked_code_adds_nothing_to_a_residual_prediction():
    p = DiscreteDiffusion(CHAINS["absorbing"], parameterisation="residual")
    logits = p.predict(lambda x_t, t, labels: torch.zeros(1, 2, K), torch.tensor([[2, K]]), torch.ones(1))
    assert logits.tolist() == [[[0, 0, 1, 0, 0], [0] * K]]


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_the_reweighted_loss_is_unbiased_too(name):
    chain = CHAINS[name]
    p = DiscreteDiffusion(chain, weighting="reweighted", time_sampling="importance", aux_weight=0.1).eval()
    p.loss_history.copy_(torch.linspace(0.1, 0.4, T))
    p.loss_count.fill_(11)
    t = torch.arange(1, T + 1)
    x0 = torch.zeros(T, 1, dtype=torch.int64)
    logits = torch.randn(T, 1, K, generator=seeded(), dtype=torch.float64)
    x_t = torch.full((T, 1), chain.mask_id or 1)
    # Each level once, weighed by its probability: the expectation over t, times T for the mean over the batch.
    probabilities = p.time_probabilities()
    losses = [
        p.objective(*(v[i : i + 1] for v in (logits, x0, x_t, t)), probabilities[i : i + 1])[0].loss * probabilities[i]
        for i in range(T)
    ]
    nll = diffusion_loss(logits, x0, x_t, t, chain, s=0, aux_weight=0.1, reduction="none")[:, 0]
    want = ((1 - t.double() / T) * nll).mean() / math.log(2)
    torch.testing.assert_close(torch.stack(losses).sum(), want, rtol=1e-9, atol=0)


def test_an_infinite_bound_is_refused_where_it_would_be_trained_on():
    chain = Absorbing(K, schedule("cosine_released", T))
    with pytest.raises(ValueError, match="the bound of Absorbing.* is infinite.*alpha_bar to end at 0"):
        DiscreteDiffusion(chain)
    DiscreteDiffusion(chain, weighting="reweighted")


@pytest.mark.parametrize("option", ["rule", "weighting"])
def test_unknown_options_are_named(option):
    with pytest.raises(ValueError, match=f"{option}: expected one of .*, got 'other'"):
        DiscreteDiffusion(CHAINS["uniform"], **{option: "other"})


@pytest.mark.parametrize("levels", [1, 2, 100, 4000])
def test_published_tables_of_mask_and_replace_are_a_chain_at_any_length(levels):
    alpha, mask = mask_and_replace(levels)
    MaskAndReplace(K, alpha, mask)
    assert alpha[0] == 1 and mask[0] == 0
    assert alpha[-1].item() == pytest.approx(9e-6) and mask[-1].item() == pytest.approx(0.99999)
    if levels > 1:
        assert alpha[1].item() == pytest.approx(0.99999) and mask[1].item() == pytest.approx(9e-6)


def test_the_reciprocal_schedule_masks_one_of_the_tokens_left_in_T_minus_t_plus_1():
    alpha = schedule("reciprocal", 20)
    t = torch.arange(1, 21, dtype=torch.float64)
    torch.testing.assert_close(1 - alpha[1:] / alpha[:-1], 1 / (20 - t + 1), rtol=1e-12, atol=0)
