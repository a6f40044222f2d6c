"""Benchmarks of the joint rule: forward noise, posterior, loss with its gradient, reverse step.

`family` in a shape names the noise, uniform if there is none. The peers are in log_onehot.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vqfast
from bench.backends import vqfast_backends
from bench.case import PEER, VQFAST, YARDSTICK, Case, Contender, Run, Verdict, judge_values, relative_error
from bench.log_onehot import (
    eager_loss,
    eager_p_sample,
    eager_posterior,
    eager_q_sample,
    log_levels,
    replace_q_sample,
)
from vqfast.kernels.diffusion_loss import reference
from vqfast.kernels.diffusion_loss.spec import noised
from vqfast.kernels.posterior.reference import posterior_backward
from vqfast.kernels.spec import generator
from vqfast.kernels.specs import DIFFUSION_LOSS, P_SAMPLE, POSTERIOR, POSTERIOR_BACKWARD, Q_SAMPLE
from vqfast.ops import (
    Absorbing,
    Marginal,
    MaskAndReplace,
    Transition,
    Uniform,
    diffusion_loss,
    p_sample,
    posterior,
    q_sample,
)

# The definition holds a dozen float64 tensors of B x L x K: on a CPU it competes where those are small.
_REFERENCE_ELEMENTS = 1e6


def few_scores(shape: Mapping[str, Any], device: str) -> bool:
    """Whether the definition competes at this size."""
    return device != "cpu" or shape["B"] * shape["L"] * shape["K"] <= _REFERENCE_ELEMENTS


# A draw is judged by sums over all tokens, in standard deviations from what the exact distribution expects.
_SIGMAS = 6.0


def transition_of(family: str, K: int, levels: Tensor, noise: Tensor | None) -> Transition:
    """The family with the tables that the specs give it."""
    if family == "absorbing":
        return Absorbing(K, levels[:, 0])
    if family == "mask_and_replace":
        return MaskAndReplace(K, levels[:, 0], levels[:, 1])
    return Uniform(K, levels[:, 0]) if noise is None else Marginal(noise, levels[:, 0])


class DiffusionProblem:
    """Codes x0 and their noised x_t (B, L), levels t and s (B,), and scores of x0 as each contender's network has them:
    `logits` (B, L, K) for vqfast, `channels` (B, K, L) for the eager form.
    """

    def __init__(self, shape: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int):
        self.K, self.shape = shape["K"], shape
        self.x0, self.x_t, self.t, self.s, levels, noise = noised(shape, device, seed)
        self.transition = transition_of(shape.get("family", "uniform"), self.K, levels, noise)
        self.levels, self.noise = self.transition.tables_on(self.x0.device)
        logits = torch.randn(*self.x0.shape, self.K, generator=generator(device, seed + 1), device=device) * 2
        self.logits = logits.to(dtype)
        self.channels = self.logits.transpose(1, 2).contiguous()


# ---- loss ------------------------------------------------------------------------------------------------------------


def gradient_of(loss, logits: Tensor):
    """A call that gives loss(logits) and its gradient."""
    logits = logits.detach().requires_grad_()

    def both() -> tuple[Tensor, Tensor]:
        value = loss(logits)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    return both


def _vqfast_loss(p: DiffusionProblem):
    return gradient_of(lambda logits: diffusion_loss(logits, p.x0, p.x_t, p.t, p.transition, s=p.s), p.logits)


def _step_levels(p: DiffusionProblem):
    alpha_t, alpha_s = p.levels[p.t, 0], p.levels[p.s, 0]
    if p.levels.shape[1] == 1:
        return log_levels(alpha_t / alpha_s, p.K, None, p.noise), log_levels(alpha_s, p.K, None, p.noise)
    gamma_t, gamma_s = p.levels[p.t, 1], p.levels[p.s, 1]
    step = log_levels(alpha_t / alpha_s, p.K, (gamma_t - gamma_s) / (1 - gamma_s))
    return step, log_levels(alpha_s, p.K, gamma_s)


def _eager_loss(p: DiffusionProblem, loss) -> Run:
    step, past, last = *_step_levels(p), p.s == 0
    both = gradient_of(lambda logits: loss(logits, p.x0, p.x_t, step, past, last), p.channels)

    def rows() -> tuple[Tensor, Tensor]:
        value, grad = both()
        return value, grad.transpose(1, 2)

    return Run(rows)


def _cross_entropy(p: DiffusionProblem) -> Run:
    target = p.x0.flatten()
    return Run(gradient_of(lambda logits: F.cross_entropy(logits.flatten(0, 1), target), p.logits))


def _exact_loss(p: DiffusionProblem) -> tuple[Tensor, Tensor]:
    """Mean loss and its gradient in float64."""
    B, L = p.x0.shape
    args = (p.logits.double(), p.x0, p.x_t, p.t, p.s, p.levels, p.noise, False, 0.0)
    return reference.diffusion_loss(*args).mean(), reference.diffusion_loss_grad(*args) / (B * L)


def _judge_loss(contender: Contender, run: Run, p: DiffusionProblem) -> Verdict:
    loss, grad = run.call()
    if contender.role == YARDSTICK:
        return Verdict()
    exact_loss, exact_grad = _exact_loss(p)
    errors = {"loss": relative_error(loss, exact_loss), "gradient": relative_error(grad, exact_grad)}
    # A gradient is given in the dtype of its logits: half a unit in the last place of each element.
    rounding = {torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(p.logits.dtype, 0.0)
    return judge_values(contender, errors, ours=1e-5 + rounding, theirs=1e-3 + rounding)


def diffusion_loss_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    version = torch.__version__
    compiled = torch.compile(eager_loss, dynamic=False)
    ops = ("diffusion_loss", "scale_rows_")
    contenders = vqfast_backends(device, ops, _vqfast_loss, reference=few_scores(shape, device)) + [
        Contender("torch log one-hot", PEER, lambda p: _eager_loss(p, eager_loss), version),
        Contender("torch.compile(log one-hot)", PEER, lambda p: _eager_loss(p, compiled), version, compiled=True),
        Contender("torch cross_entropy (another loss)", YARDSTICK, _cross_entropy, version),
    ]
    return Case(
        op="diffusion_loss",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: DiffusionProblem(shape, dtype, device, seed),
        judge=_judge_loss,
        contenders=tuple(contenders),
        bytes_moved=DIFFUSION_LOSS.bytes_moved(shape, dtype),
        flops=DIFFUSION_LOSS.flops(shape),
    )


# ---- posterior -------------------------------------------------------------------------------------------------------


def _with_gradient(of, logits: Tensor, grad: Tensor):
    """A call that gives of(logits) and, for the gradient `grad` to it, that to logits."""
    logits = logits.detach().requires_grad_()

    def both() -> tuple[Tensor, Tensor]:
        log_p = of(logits)
        return log_p.detach(), torch.autograd.grad(log_p, logits, grad)[0]

    return both


def _incoming(p: DiffusionProblem) -> Tensor:
    g = generator(p.logits.device, 5)
    return torch.randn(p.logits.shape, generator=g, device=p.logits.device).to(p.logits.dtype)


def _vqfast_posterior(p: DiffusionProblem):
    return _with_gradient(lambda logits: posterior(logits, p.x_t, p.t, p.s, p.transition), p.logits, _incoming(p))


def _eager_posterior(p: DiffusionProblem, of) -> Run:
    step, past = _step_levels(p)
    grad = _incoming(p).transpose(1, 2).contiguous()
    both = _with_gradient(lambda logits: of(logits.float().log_softmax(1), p.x_t, step, past), p.channels, grad)
    return Run(lambda: tuple(part.transpose(1, 2) for part in both()))


def _judge_posterior(contender: Contender, run: Run, p: DiffusionProblem) -> Verdict:
    rest = p.x_t, p.t, p.s, p.levels, p.noise, False
    log_p, grad = run.call()
    errors = {
        "log-probabilities": relative_error(log_p, reference.posterior(p.logits.double(), *rest)),
        "gradient": relative_error(grad, posterior_backward(_incoming(p).double(), p.logits.double(), *rest)),
    }
    return judge_values(contender, errors, ours=1e-5, theirs=1e-3)


def posterior_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    """Log-probabilities of a step, and the gradient to its logits."""
    version = torch.__version__
    compiled = torch.compile(eager_posterior, dynamic=False)
    contenders = vqfast_backends(device, ("posterior", "posterior_backward"), _vqfast_posterior) + [
        Contender("torch log one-hot", PEER, lambda p: _eager_posterior(p, eager_posterior), version),
        Contender("torch.compile(log one-hot)", PEER, lambda p: _eager_posterior(p, compiled), version, compiled=True),
    ]
    return Case(
        op="posterior",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: DiffusionProblem(shape, dtype, device, seed),
        judge=_judge_posterior,
        contenders=tuple(contenders),
        bytes_moved=POSTERIOR.bytes_moved(shape, dtype) + POSTERIOR_BACKWARD.bytes_moved(shape, dtype),
        flops=POSTERIOR.flops(shape) + POSTERIOR_BACKWARD.flops(shape),
    )


# ---- samples ---------------------------------------------------------------------------------------------------------


def judge_draws(log_p: Tensor, drawn: Tensor, x: Tensor) -> Verdict:
    """Whether codes look drawn from log_p (B, L, K), float64, by two sums over all tokens: how many equal x (B, L), and
    the log-probability of what was drawn.
    """
    if drawn.shape != x.shape or bool(((drawn < 0) | (drawn >= log_p.shape[-1])).any()):
        return Verdict(wrong=f"codes out of range, or shape {tuple(drawn.shape)}, expected {tuple(x.shape)}")
    stay = log_p.gather(-1, x[..., None])[..., 0].exp()
    stays = ((drawn == x).double() - stay).sum() / (stay * (1 - stay)).sum().clamp(min=1e-12).sqrt()
    p, finite = log_p.exp(), log_p.clamp(min=-1e3)
    mean = (p * finite).sum(-1)
    variance = ((p * finite.square()).sum(-1) - mean.square()).clamp(min=0)
    given = finite.gather(-1, drawn[..., None])[..., 0]
    likely = (given - mean).sum() / variance.sum().clamp(min=1e-12).sqrt()
    sigmas = max(abs(float(stays)), abs(float(likely)))
    wrong = "" if sigmas < _SIGMAS else f"draws are {sigmas:.0f} standard deviations off their distribution"
    return Verdict(wrong=wrong)


def seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(20)


def judge_seeded(contender: Contender, run: Run, again, allowed: int) -> Verdict:
    """vqfast draws the same tokens on every backend: its seeded draw against that of the definition, `again()`."""
    if contender.role != VQFAST:
        return Verdict()
    with vqfast.backend("reference"):
        exact = again()
    wrong = int((run.evidence() != exact).sum())
    return Verdict(mismatches=wrong, wrong=f"{wrong} of {exact.numel()} tokens differ" if wrong > allowed else "")


def _vqfast_p_sample(p: DiffusionProblem) -> Run:
    def draw(generator: torch.Generator | None = None) -> Tensor:
        return p_sample(p.logits, p.x_t, p.t, p.s, p.transition, generator=generator)

    return Run(draw, evidence=lambda: draw(seeded(p.x0.device)))


def _eager_p_sample(p: DiffusionProblem, sample) -> Run:
    step, past = _step_levels(p)
    return Run(lambda: sample(p.channels, p.x_t, step, past))


def _judge_p_sample(contender: Contender, run: Run, p: DiffusionProblem) -> Verdict:
    log_p = reference.posterior(p.logits.double(), p.x_t, p.t, p.s, p.levels, p.noise, False)
    verdict = judge_draws(log_p, run.call(), p.x_t)
    # A draw within rounding of the boundary between two codes may fall on either side.
    allowed = 1 + p.x0.numel() // 1000
    return verdict if verdict.wrong else judge_seeded(contender, run, _vqfast_p_sample(p).evidence, allowed)


def p_sample_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    version = torch.__version__
    compiled = torch.compile(eager_p_sample, dynamic=False)
    contenders = vqfast_backends(device, ("p_sample",), _vqfast_p_sample) + [
        Contender("torch log one-hot, Gumbel", PEER, lambda p: _eager_p_sample(p, eager_p_sample), version),
        Contender(
            "torch.compile(log one-hot, Gumbel)", PEER, lambda p: _eager_p_sample(p, compiled), version, compiled=True
        ),
    ]
    return Case(
        op="p_sample",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: DiffusionProblem(shape, dtype, device, seed),
        judge=_judge_p_sample,
        contenders=tuple(contenders),
        bytes_moved=P_SAMPLE.bytes_moved(shape, dtype),
        flops=P_SAMPLE.flops(shape),
    )


class NoiseProblem:
    """Codes x0 (B, L) and levels t (B,)."""

    def __init__(self, shape: Mapping[str, Any], device: str, seed: int):
        self.x0, self.t, levels, _, self.K, _ = Q_SAMPLE.inputs(shape, torch.int64, device, seed)
        self.alpha_bar = levels[:, 0]
        self.transition = Uniform(self.K, self.alpha_bar)


def _vqfast_q_sample(p: NoiseProblem) -> Run:
    def draw(generator: torch.Generator | None = None) -> Tensor:
        return q_sample(p.x0, p.t, p.transition, generator=generator)

    return Run(draw, evidence=lambda: draw(seeded(p.x0.device)))


def _eager_q_sample(p: NoiseProblem) -> Run:
    levels = log_levels(p.alpha_bar[p.t], p.K)
    return Run(lambda: eager_q_sample(p.x0, levels, p.K))


def _replace_q_sample(p: NoiseProblem) -> Run:
    return Run(lambda: replace_q_sample(p.x0, p.alpha_bar[p.t], p.K))


def _judge_q_sample(contender: Contender, run: Run, p: NoiseProblem) -> Verdict:
    alpha = p.alpha_bar[p.t][:, None, None]
    likelihood = alpha * F.one_hot(p.x0, p.K) + (1 - alpha) / p.K
    verdict = judge_draws(likelihood.log().clamp(min=-1e3), run.call(), p.x0)
    return verdict if verdict.wrong else judge_seeded(contender, run, _vqfast_q_sample(p).evidence, allowed=0)


def q_sample_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    version = torch.__version__
    contenders = vqfast_backends(device, ("q_sample",), _vqfast_q_sample) + [
        Contender("torch log one-hot, Gumbel", PEER, _eager_q_sample, version),
        Contender("torch rand, randint, where", PEER, _replace_q_sample, version),
    ]
    return Case(
        op="q_sample",
        shape=shape,
        dtype=torch.int64,
        device=device,
        problem=lambda seed: NoiseProblem(shape, device, seed),
        judge=_judge_q_sample,
        contenders=tuple(contenders),
        bytes_moved=Q_SAMPLE.bytes_moved(shape, torch.int64),
        flops=Q_SAMPLE.flops(shape),
    )
