"""The training process: how levels are drawn, what the objective estimates, what the bound is."""

import math

import pytest
import torch

from vqfast.diffusion import DiscreteDiffusion, Uniform, prior_kl, schedule
from vqfast.ops import diffusion_loss, q_sample

K, T = 5, 12
SHARES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625], dtype=torch.float64)


def process(name: str = "cosine", **options) -> DiscreteDiffusion:
    return DiscreteDiffusion(Uniform(K, schedule(name, T)), **options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_logits(logits):
    """A denoiser that looks at nothing."""
    return lambda x_t, t, labels: logits.expand(*x_t.shape, -1)


def random_denoiser(dtype=torch.float64):
    """A denoiser that depends on x_t and t."""
    table = torch.randn(T + 1, K, K, generator=seeded(3), dtype=dtype)
    return lambda x_t, t, labels: table[t[:, None], x_t]


# How t is drawn


def test_levels_cover_the_chain_evenly():
    t, p_t = process().draw_t(3 * T, generator=seeded())
    assert torch.equal(torch.bincount(t, minlength=T + 1), torch.tensor([0] + [3] * T))
    torch.testing.assert_close(p_t, torch.full((3 * T,), 1 / T, dtype=torch.float64))


def test_each_level_alone_is_uniform():
    g = seeded()
    first = torch.cat([process().draw_t(5, generator=g)[0][3:4] for _ in range(1200)])
    counts = torch.bincount(first, minlength=T + 1)[1:].double()
    assert ((counts - 100).abs() < 5 * math.sqrt(100)).all()


def test_importance_waits_until_every_level_was_visited_often_enough():
    p = process(time_sampling="importance")
    p.loss_history.copy_(torch.arange(T) + 1.0)
    p.loss_count.fill_(11)
    p.loss_count[4] = 10
    uniform = torch.full((T,), 1 / T, dtype=torch.float64)
    assert torch.equal(p.time_probabilities(), uniform)
    p.loss_count[4] = 11
    weight = (torch.arange(T, dtype=torch.float64) + 1 + 1e-10).sqrt() + 1e-4
    weight[0] = weight[1]
    torch.testing.assert_close(p.time_probabilities(), weight / weight.sum())


def test_importance_draws_follow_their_probabilities():
    p = process(time_sampling="importance")
    p.loss_history.copy_(torch.linspace(0.1, 9, T))
    p.loss_count.fill_(11)
    n = 1000
    t, p_t = p.draw_t(n, generator=seeded())
    counts = torch.bincount(t, minlength=T + 1)[1:]
    assert (counts - n * p.time_probabilities()).abs().max() <= 1  # stratified: never off by more than one
    torch.testing.assert_close(p_t, p.time_probabilities()[t - 1])


def test_a_chain_of_one_level_can_be_sampled_by_importance():
    p = DiscreteDiffusion(Uniform(K, schedule("linear", 1)), time_sampling="importance")
    p.loss_count.fill_(11)
    assert p.draw_t(4)[0].tolist() == [1] * 4


def test_samples_that_share_a_level_are_recorded_in_any_order_alike():
    t, nats = torch.tensor([3, 7, 3, 3]), torch.tensor([1.0, 2.0, 3.0, 5.0])
    one, other = process(), process()
    one.record(t, nats)
    other.record(t.flip(0), nats.flip(0))
    torch.testing.assert_close(one.loss_history, other.loss_history, rtol=1e-6, atol=0)
    assert one.loss_history[2].item() == pytest.approx(0.1 * (1 + 9 + 25) / 3)
    assert one.loss_count[[2, 6]].tolist() == [3, 1]


def test_losses_are_recorded_in_training_only_and_saved_with_the_model():
    x0 = torch.randint(K, (2 * T, 3), generator=seeded())
    p = process(time_sampling="importance").eval()
    p(random_denoiser(), x0)
    assert p.loss_count.sum() == 0
    p.train()
    p(random_denoiser(), x0)
    assert p.loss_count.tolist() == [2] * T and (p.loss_history > 0).all()
    other = process(time_sampling="importance")
    other.load_state_dict(p.state_dict())
    assert torch.equal(other.loss_history, p.loss_history) and torch.equal(other.loss_count, p.loss_count)


# What the objective estimates


def exact_bound(p: DiscreteDiffusion, denoiser, x0: torch.Tensor) -> torch.Tensor:
    """(B,) nats: every term of the bound, summed over all values of x_t of a single token."""
    chain, total = p.transition, prior_kl(p.transition)[0]
    for t in range(1, T + 1):
        for code in range(K):
            x_t, level = torch.full_like(x0, code), torch.full((len(x0),), t)
            q = chain.alpha_bar[t] * (x_t == x0) + (1 - chain.alpha_bar[t]) / K
            logits = p.predict(denoiser, x_t, level)
            total = total + (q * diffusion_loss(logits, x0, x_t, level, chain, reduction="none")).sum(1)
    return total


@pytest.mark.parametrize("parameterisation", ["x0", "residual"])
@pytest.mark.parametrize("time_sampling", ["uniform", "importance"])
def test_the_objective_is_an_unbiased_estimate_of_the_bound(parameterisation, time_sampling):
    p = process(parameterisation=parameterisation, time_sampling=time_sampling).eval()
    p.loss_history.copy_(torch.linspace(0.1, 0.4, T))
    p.loss_count.fill_(11)
    x0 = torch.tensor([[1]])
    exact = exact_bound(p, random_denoiser(), x0).item() / math.log(2)
    g = seeded()
    estimates = torch.stack([p(random_denoiser(), x0.expand(24_000, 1), generator=g).bits_per_dim for _ in range(20)])
    error = estimates.std() / math.sqrt(20)
    assert abs(estimates.mean() - exact) < 5 * error < 0.05 * exact


def test_the_elbo_estimates_the_bound():
    p, x0 = process(), torch.tensor([[2]])
    exact = exact_bound(p, random_denoiser(), x0).item()
    elbo = p.elbo(random_denoiser(), x0.expand(20_000, 1), generator=seeded())
    assert elbo.terms.shape == (T, 20_000)
    torch.testing.assert_close(elbo.total, elbo.terms.sum(0) + elbo.prior)
    assert abs(elbo.total.mean() - exact) < 5 * elbo.total.std() / math.sqrt(20_000)


@pytest.mark.parametrize("steps", [None, 5, 1])
def test_the_bound_of_the_true_model_is_the_entropy(steps):
    # For one token, the chain whose x_0 prediction is the data distribution is the exact reverse of the
    # noise, in any number of steps: the bound on data drawn from it is tight.
    logits = SHARES.log()
    x0 = torch.multinomial(SHARES, 20_000, replacement=True, generator=seeded())[:, None]
    entropy = -(SHARES * SHARES.log2()).sum().item()
    bits = process().bits_per_dim(same_logits(logits), x0, steps=steps, generator=seeded(1))
    assert bits.shape == (20_000,)
    assert abs(bits.mean() - entropy) < 5 * bits.std() / math.sqrt(20_000)


def test_the_auxiliary_term_is_the_weighted_cross_entropy():
    x0 = torch.randint(K, (64, 3), generator=seeded())
    logits = torch.randn(64, 3, K, generator=seeded(1), dtype=torch.float64)
    p = process(aux_weight=0.25)
    objective = p(lambda x_t, t, labels: logits, x0)
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x0.flatten()) / math.log(2)
    # Every t has probability 1 / T, so that each sample weighs T.
    difference = objective.loss - objective.bits_per_dim
    torch.testing.assert_close(difference, 0.25 * T * cross_entropy, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", ["elbo", "reweighted"])
def test_the_adaptive_auxiliary_term_counts_twice_at_the_first_level_and_once_at_the_last(weighting):
    x0 = torch.randint(K, (2 * T, 3), generator=seeded())
    x_t = torch.randint(K, x0.shape, generator=seeded(4))
    t = torch.arange(1, T + 1).repeat(2)
    p_t = torch.full((2 * T,), 1 / T, dtype=torch.float64)

    def loss_and_gradient(**options):
        logits = torch.randn(2 * T, 3, K, generator=seeded(1), dtype=torch.float64).requires_grad_()
        objective, nats = process(weighting=weighting, **options).objective(logits, x0, x_t, t, p_t)
        return logits, objective, torch.autograd.grad(objective.loss, logits)[0]

    logits, plain, plain_grad = loss_and_gradient()
    _, objective, grad = loss_and_gradient(aux_weight=0.25, aux_schedule="adaptive")
    cross_entropy = -logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0] / math.log(2)
    factor = torch.linspace(2, 1 + 1 / T, T, dtype=torch.float64).repeat(2)
    share = 1.0 if weighting == "elbo" else (1 - t.double() / T) / T
    extra = 0.25 * T * (share * factor * cross_entropy.mean(1)).mean()
    torch.testing.assert_close(objective.loss - plain.loss, extra)
    torch.testing.assert_close(grad - plain_grad, torch.autograd.grad(extra, logits)[0])
    torch.testing.assert_close(objective.bits_per_dim, plain.bits_per_dim)


def test_the_gradient_is_that_of_the_bound():
    chain = process().transition
    x0 = torch.randint(K, (6, 2), generator=seeded())
    t, p_t = torch.tensor([1, 2, 5, 8, 11, 12]), torch.linspace(0.05, 0.2, 6, dtype=torch.float64)
    x_t = q_sample(x0, t, chain, generator=seeded(1))
    logits = torch.randn(6, 2, K, generator=seeded(2), dtype=torch.float64)
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    process().objective(one, x0, x_t, t, p_t)[0].loss.backward()
    per_sample = diffusion_loss(other, x0, x_t, t, chain, reduction="none").sum(1)
    (per_sample / p_t / (x0.numel() * math.log(2))).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-12)


def test_the_residual_leaves_the_denoisers_output_as_it_is():
    output = torch.zeros(2, 3, K)
    x_t = torch.tensor([[0, 1, 2], [3, 4, 0]])
    logits = process(parameterisation="residual").predict(lambda *_: output, x_t, torch.ones(2))
    assert torch.equal(logits, torch.nn.functional.one_hot(x_t, K).float())
    assert output.abs().max() == 0


@pytest.mark.parametrize("time_sampling", ["uniform", "importance"])
def test_a_training_step_is_one_graph_without_a_host_sync(time_sampling):
    p = process(time_sampling=time_sampling, aux_weight=0.1)
    table = torch.randn(K, K, requires_grad=True)
    step = torch.compile(lambda x0: p(lambda x_t, t, _: table[x_t], x0).loss, fullgraph=True, backend="eager")
    step(torch.randint(K, (24, 3))).backward()
    assert table.grad.abs().sum() > 0
    assert p.loss_count.sum() == (24 if time_sampling == "importance" else 0)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.3, 1.0])
def test_the_prior_term_is_a_divergence(alpha):
    chain = Uniform(K, torch.tensor([1.0, alpha], dtype=torch.float64))
    q = torch.full((K,), (1 - alpha) / K, dtype=torch.float64)
    q[0] += alpha
    expected = torch.special.xlogy(q, q * K).sum().item()
    assert prior_kl(chain) == pytest.approx(expected, rel=1e-9, abs=1e-15)


# What is refused


@pytest.mark.parametrize(
    "option, message",
    [
        (dict(parameterisation="v"), "parameterisation: expected one of x0, residual, got 'v'"),
        (dict(time_sampling="log"), "time_sampling: expected one of uniform, importance, got 'log'"),
        (dict(aux_schedule="linear"), "aux_schedule: expected one of constant, adaptive, got 'linear'"),
        (dict(aux_weight=-1), "aux_weight: expected at least 0"),
    ],
)
def test_unknown_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        process(**option)


def test_a_denoiser_of_another_codebook_is_named():
    with pytest.raises(ValueError, match="logits: expected K = 5"):
        process()(lambda x_t, t, labels: torch.zeros(*x_t.shape, K + 1), torch.zeros(2, 3, dtype=torch.int64))


def test_a_code_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"x0: expected values in 0\.\.4"):
        process()(random_denoiser(), torch.full((2, 3), K))


def test_a_bound_over_more_steps_than_levels_is_refused():
    with pytest.raises(ValueError, match=r"steps: expected a whole number in 1\.\.12"):
        process().elbo(random_denoiser(), torch.zeros(2, 3, dtype=torch.int64), steps=13)


def test_what_is_printed_says_what_is_trained():
    assert repr(process()) == (
        f"DiscreteDiffusion(Uniform(codebook_size={K}, T={T}), rule='joint', parameterisation='x0', "
        "time_sampling='uniform', weighting='elbo')"
    )
    assert "aux_weight=0.1 (adaptive)" in repr(process(aux_weight=0.1, aux_schedule="adaptive"))
