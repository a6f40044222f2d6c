"""Diffusion with a mask state against the numbers of two released implementations (golden: vq_diffusion,
absorbing_reweighted).

VQ-Diffusion's arrays are float32 and 0-based in time, and clamped to [-70, 0]; terms near 0 carry an absolute error
near 1e-6 (finding 7 of the golden README). With the published end values the chain is practically absorbing (finding
12).
"""

import math
from contextlib import nullcontext

import pytest
import torch

import vqfast
from vqfast.diffusion import Absorbing, DiscreteDiffusion, MaskAndReplace, mask_and_replace, schedule
from vqfast.ops import diffusion_loss, p_sample, posterior, q_sample

# name: K, T, last alpha_bar, last mask_bar, weights of masked and other tokens, auxiliary weight, whether it grows
CASES = {
    "released": (16, 100, 9e-6, 0.99999, (1, 1), 5e-4, True),
    "replace": (16, 100, 9e-6, 0.5, (1, 1), 1e-3, False),
    "weights": (16, 10, 0.02, 0.9, (1.0, 0.3), 0.05, True),
    "K512": (512, 100, 9e-6, 0.7, (1, 1), 5e-4, True),
}


@pytest.fixture(params=["default", "reference"], autouse=True)
def backend(request):
    with vqfast.backend(request.param) if request.param != "default" else nullcontext():
        yield


def classes_last(x):
    return x.transpose(1, 2).contiguous()


@pytest.fixture(params=CASES)
def case(request, golden):
    """The chain, the options and the arrays of one case, levels 1-based."""
    K, T, alpha_last, mask_last, *options = CASES[request.param]
    start = request.param + "/"
    g = {k.removeprefix(start): v for k, v in golden("vq_diffusion").items() if k.startswith(start)}
    g["t"], g["logits"] = g["t"] + 1, classes_last(g["logits"])
    return MaskAndReplace(K, *mask_and_replace(T, alpha_last=alpha_last, mask_last=mask_last)), options, g


def test_the_tables(case):
    chain, _, g = case
    alpha, mask = chain.alpha_bar, chain.mask_bar
    # Theirs has level 0 at the end.
    for ours, theirs in (
        (alpha, g["log_cum_at"]),
        (mask, g["log_cum_ct"]),
        (((1 - alpha) - mask) / chain.codebook_size, g["log_cum_bt"]),
    ):
        torch.testing.assert_close(ours[1:], theirs[:-1].double().exp(), rtol=2e-5, atol=1e-8)
    kept, unmasked = alpha[1:] / alpha[:-1], (1 - mask[1:]) / (1 - mask[:-1])
    torch.testing.assert_close(kept, g["log_at"].double().exp(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(1 - unmasked, g["log_ct"].double().exp(), rtol=1e-5, atol=1e-7)


def test_the_posteriors(case):
    chain, _, g = case
    step = g["x_t"], g["t"], g["t"] - 1, chain
    with vqfast.backend("reference"):
        model = posterior(g["logits"].double(), *step, rule="marginal")
        true = posterior(torch.nn.functional.one_hot(g["x0"], chain.codebook_size).double().log(), *step)
    torch.testing.assert_close(model.exp(), classes_last(g["log_p_prev"]).double().exp(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(model.exp(), classes_last(g["scheduler_posterior"]).double().exp(), rtol=1e-5, atol=4e-6)
    torch.testing.assert_close(true.exp(), classes_last(g["log_posterior_true"]).double().exp(), rtol=1e-5, atol=1e-6)


def test_the_divergence_of_each_token(case):
    chain, _, g = case
    loss = diffusion_loss(g["logits"], g["x0"], g["x_t"], g["t"], chain, rule="marginal", reduction="none")
    torch.testing.assert_close(loss, g["kl"], rtol=1e-5, atol=6e-6)


def test_the_losses_and_their_gradient(case):
    chain, ((masked_weight, code_weight), aux_weight, grows), g = case
    T, K = chain.T, chain.codebook_size
    logits = g["logits"].clone().requires_grad_()
    trained, evaluated = [], []
    for b, t in enumerate(g["t"].tolist()):
        sample = logits[b : b + 1], g["x0"][b : b + 1], g["x_t"][b : b + 1], t, chain
        weights = torch.where(sample[2] == K, masked_weight, code_weight).double()
        # The likelihood of the last step is not weighted.
        weights = torch.ones_like(weights) if t == 1 else weights
        aux = aux_weight * (2 - (t - 1) / T if grows else 1)
        options = dict(rule="marginal", weights=T * weights, reduction="sum")
        trained.append(diffusion_loss(*sample, aux_weight=aux, **options))
        evaluated.append(diffusion_loss(*sample, **options))
    error = 6e-6 * T
    torch.testing.assert_close(torch.stack(evaluated), g["loss_eval"], rtol=1e-5, atol=error)
    torch.testing.assert_close(torch.stack(trained), g["loss_train"], rtol=1e-5, atol=error)
    (torch.stack(trained).sum() / g["x0"].numel()).backward()
    torch.testing.assert_close(logits.grad, classes_last(g["grad_logits"]), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["released", "replace", "weights"])
def test_draws_follow_the_marginals_and_the_model(golden, name):
    arrays = golden("vq_diffusion")
    g = {k.removeprefix(name + "/"): v for k, v in arrays.items() if k.startswith(name + "/")}
    K, T, alpha_last, mask_last, *_ = CASES[name]
    chain = MaskAndReplace(K, *mask_and_replace(T, alpha_last=alpha_last, mask_last=mask_last))
    n, t = 4000, g["t"] + 1
    x0, x_t, levels, logits = (v.repeat_interleave(n, 0) for v in (g["x0"], g["x_t"], t, classes_last(g["logits"])))
    drawn = {
        "q_pred": q_sample(x0, levels, chain, generator=torch.Generator().manual_seed(0)),
        "log_p_prev": p_sample(
            logits, x_t, levels, levels - 1, chain, rule="marginal", generator=torch.Generator().manual_seed(1)
        ),
    }
    for array, draws in drawn.items():
        share = torch.nn.functional.one_hot(draws, K + 1).double().view(len(t), n, -1, K + 1).mean(1)
        expected = classes_last(g[array]).double().exp()
        error = (expected * (1 - expected)).clamp(min=0).div(n).sqrt() + 1 / n
        assert ((share - expected) / error).abs().max() < 5.5


# Unleashing Transformers


@pytest.fixture
def absorbing(golden):
    g = golden("absorbing_reweighted")
    return Absorbing(32, schedule("reciprocal", 256)), g


def test_the_reweighted_bound_of_absorbing_diffusion(absorbing):
    """Finding 13: at t = T the weight, and so the loss, is 0."""
    chain, g = absorbing
    process = DiscreteDiffusion(chain, weighting="reweighted")
    logits = g["logits"].clone().requires_grad_()
    p_t = torch.full(g["t"].shape, 1 / chain.T, dtype=torch.float64)
    objective, nats = process.objective(logits, g["x0"], g["x_t"], g["t"], p_t)
    objective.loss.backward()
    torch.testing.assert_close(objective.loss, g["reweighted_elbo/loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(objective.bits_per_dim, g["reweighted_elbo/vb_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad, g["reweighted_elbo/grad_logits"], rtol=1e-5, atol=1e-8)
    bits = nats * chain.T / (math.log(2) * g["x0"].shape[1])
    history = 0.9 * torch.linspace(0, 3, chain.T + 1)[g["t"]] + 0.1 * bits**2
    torch.testing.assert_close(history, g["reweighted_elbo/Lt_history_after"][g["t"]], rtol=1e-4, atol=1e-5)


def test_the_bound_of_absorbing_diffusion(absorbing):
    chain, g = absorbing
    process = DiscreteDiffusion(chain)
    logits = g["logits"].clone().requires_grad_()
    p_t = torch.full(g["t"].shape, 1 / chain.T, dtype=torch.float64)
    objective, _ = process.objective(logits, g["x0"], g["x_t"], g["t"], p_t)
    objective.loss.backward()
    torch.testing.assert_close(objective.loss, g["elbo/loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad, g["elbo/grad_logits"], rtol=1e-5, atol=1e-7)


def test_masked_language_modelling_is_the_loss_of_the_step_to_data(absorbing):
    chain, g = absorbing
    logits = g["logits"].clone().requires_grad_()
    masked = g["x_t"] == 32
    weights = 1 / (masked.sum(1).clamp(min=1) * len(g["t"]))
    loss = diffusion_loss(logits, g["x0"], g["x_t"], g["t"], chain, s=0, weights=weights, reduction="sum")
    loss.backward()
    torch.testing.assert_close(loss, g["mlm/loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad, g["mlm/grad_logits"], rtol=1e-5, atol=1e-7)
