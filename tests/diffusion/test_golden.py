"""Uniform diffusion against the numbers of the released implementations (golden: multinomial_fixed_logits).

Their arrays are float32 and 0-based in time: index i is the step from level i + 1 to i. Float32 leaves them
with an absolute error near 1e-6 in terms close to 0, which the tolerances below are made of.
"""

import math
from contextlib import nullcontext

import pytest
import torch

import vqfast
from vqfast.diffusion import DiscreteDiffusion, Uniform, prior_kl, schedule
from vqfast.ops import diffusion_loss, p_sample, posterior, q_sample

CASES = {"K12_T100": (12, 100), "K12_2d_T4000": (12, 4000), "K512_T4000": (512, 4000)}


def transition(K: int, T: int) -> Uniform:
    return Uniform(K, schedule("cosine_released", T))


@pytest.fixture(params=["default", "reference"], autouse=True)
def backend(request):
    """Whatever this machine picks, and the definition."""
    with vqfast.backend(request.param) if request.param != "default" else nullcontext():
        yield


def classes_last(x):
    """(B, K, ...) to (B, L, K)."""
    return x.flatten(2).transpose(1, 2).contiguous()


@pytest.fixture(params=CASES)
def case(request, golden):
    """The chain and the arrays of one case, tokens flat and levels 1-based."""
    K, T = CASES[request.param]
    start = request.param + "/"
    arrays = golden("multinomial_fixed_logits")
    g = {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}
    g["x0"], g["x_t"], g["t"] = g["x0"].flatten(1), g["x_t"].flatten(1), g["t"] + 1
    g["logits"] = classes_last(g["logits"])
    return transition(K, T), g


def test_the_loss_of_each_token(case):
    chain, g = case
    loss = diffusion_loss(g["logits"], g["x0"], g["x_t"], g["t"], chain, reduction="none")
    first = (g["t"] == 1)[:, None]
    expected = torch.where(first, g["decoder_nll"].flatten(1), g["kl"].flatten(1))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=6e-6)
    torch.testing.assert_close(loss.sum(1), g["loss_t"], rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_logits(case):
    chain, g = case
    logits = g["logits"].requires_grad_()
    loss = diffusion_loss(logits, g["x0"], g["x_t"], g["t"], chain, reduction="sum")
    (loss / (math.log(2) * g["x0"].numel())).backward()
    torch.testing.assert_close(logits.grad, classes_last(g["grad_logits"]), rtol=1e-5, atol=1e-7)


def test_the_posteriors(case):
    chain, g = case
    logits = g["logits"].double()
    x0 = torch.nn.functional.one_hot(g["x0"], chain.codebook_size).double().log()
    with vqfast.backend("reference"):
        true, model = (posterior(v, g["x_t"], g["t"], g["t"] - 1, chain) for v in (x0, logits))
    # Theirs has log 1e-30 where ours has log 0: compared as probabilities.
    torch.testing.assert_close(true.exp(), classes_last(g["log_posterior"]).double().exp(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model, classes_last(g["log_p_prev"]).double(), rtol=1e-5, atol=1e-5)


def test_forward_draws_follow_the_marginals(golden):
    g = golden("multinomial_fixed_logits")
    x0, t = g["K12_T100/x0"], g["K12_T100/t"] + 1
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = q_sample(x0.repeat_interleave(n, 0), t.repeat_interleave(n), transition(12, 100), generator=generator)
    share = torch.nn.functional.one_hot(drawn, 12).double().view(len(t), n, -1, 12).mean(1)
    expected = classes_last(g["K12_T100/q_pred"]).double().exp()
    deviation = (share - expected) / (expected * (1 - expected) / n).sqrt()
    assert deviation.abs().max() < 5  # of 360 frequencies, in standard errors


def test_reverse_draws_follow_the_model(golden):
    g = golden("multinomial_fixed_logits")
    x_t, t = g["K12_T100/x_t"], g["K12_T100/t"] + 1
    n = 5_000
    repeated = [v.repeat_interleave(n, 0) for v in (classes_last(g["K12_T100/logits"]), x_t, t, t - 1)]
    generator = torch.Generator().manual_seed(0)
    drawn = p_sample(*repeated, transition(12, 100), generator=generator)
    share = torch.nn.functional.one_hot(drawn, 12).double().view(len(t), n, -1, 12).mean(1)
    expected = classes_last(g["K12_T100/log_p_prev"]).double().exp()
    error = (expected * (1 - expected) / n).sqrt() + 1 / n  # a single draw of a rare code is no deviation
    assert ((share - expected) / error).abs().max() < 5


def test_the_training_objective(case):
    chain, g = case
    process = DiscreteDiffusion(chain)
    p_t = torch.full((len(g["t"]),), 1 / chain.T, dtype=torch.float64)
    objective, nats = process.objective(g["logits"], g["x0"], g["x_t"], g["t"], p_t)
    torch.testing.assert_close(objective.loss, g["train_loss_bpd"], rtol=1e-5, atol=0)
    torch.testing.assert_close(objective.bits_per_dim, g["train_loss_bpd"], rtol=1e-5, atol=0)
    torch.testing.assert_close(nats, g["loss_t"], rtol=1e-5, atol=1e-5)
    log_prob = -(nats * chain.T + g["x0"].shape[1] * prior_kl(chain)[0])
    torch.testing.assert_close(log_prob, g["train_log_prob"], rtol=1e-5, atol=1e-5 * chain.T)


@pytest.mark.parametrize("name", ["K12_T100", "K12_2d_T4000"])
def test_the_tables_of_importance_sampling_after_a_step(golden, name):
    arrays = golden("multinomial_fixed_logits")
    g = {key.removeprefix(name + "/"): value for key, value in arrays.items()}
    process = DiscreteDiffusion(transition(*CASES[name]), time_sampling="importance")
    process.loss_history.copy_(g["Lt_history_before"])
    process.loss_count.fill_(3)
    process.record(g["t"] + 1, g["loss_t"])
    torch.testing.assert_close(process.loss_history, g["Lt_history_after"], rtol=1e-6, atol=1e-6)
    assert torch.equal(process.loss_count, g["Lt_count_after"].long())


def test_the_distribution_of_t(golden):
    g = golden("multinomial_fixed_logits")
    process = DiscreteDiffusion(transition(12, 100), time_sampling="importance")
    process.loss_history.copy_(g["importance/history"])
    process.loss_count.fill_(11)
    torch.testing.assert_close(process.time_probabilities().float(), g["importance/p_t"], rtol=1e-6, atol=1e-9)


def test_the_whole_bound_over_a_chain(golden):
    g = golden("multinomial_fixed_logits")
    chain = transition(12, 100)
    x0, logits = g["chain/x0"], classes_last(g["chain/logits"])
    terms = torch.stack(
        [
            diffusion_loss(logits, x0, x_t, t, chain, reduction="none").sum(1)
            for t, x_t in enumerate(g["chain/x_t"], start=1)
        ]
    )
    torch.testing.assert_close(terms, g["chain/terms"], rtol=1e-5, atol=1e-5)
    nll = terms.sum(0) + x0.shape[1] * prior_kl(chain)[0]
    torch.testing.assert_close(nll, g["chain/nll"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "name, K, T, L, exact", [("K12_T100", 12, 100, 5, 6.67e-6), ("K12_2d_T4000", 12, 4000, 12, 1.0e-8),
                             ("K512_T4000", 512, 4000, 6, 2.3e-7)]
)  # fmt: skip
def test_the_prior_term_is_right_where_float32_is_not(golden, name, K, T, L, exact):
    ours = L * prior_kl(transition(K, T))[0].item()
    assert ours == pytest.approx(exact, rel=0.02)  # the value in float64, to the digits that are published
    stored = golden("multinomial_fixed_logits")[f"{name}/kl_prior"]
    assert (stored - ours).abs().max() < 1e-6


def test_the_residual_parameterisation_adds_the_one_hot_of_x_t(golden):
    g = golden("multinomial_fixed_logits")
    process = DiscreteDiffusion(transition(12, 100), parameterisation="residual")
    output = classes_last(g["residual/net_output"])
    logits = process.predict(lambda x_t, t, labels: output, g["residual/x_t"].flatten(1), torch.ones(3))
    torch.testing.assert_close(logits.log_softmax(-1), classes_last(g["residual/log_x0"]), rtol=1e-5, atol=1e-6)
