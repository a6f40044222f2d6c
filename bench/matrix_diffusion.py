"""Benchmarks of a chain through matrices, D3PM's discretised Gaussian: loss with its gradient, reverse step, for
(B, L) codes each sample at a level of its own.

The peer is D3PM as published (Austin et al. 2021): the products Q_1 ... Q_t of every level and every step are kept, two
stacks of T x K x K float32, and a call picks from them. vqfast keeps a quarter of one, in float64, and multiplies. The
published form adds 1e-6 inside each logarithm, which puts its gradient off by tenths; the peer adds 1e-30.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.backends import vqfast_backends
from bench.case import PEER, YARDSTICK, Case, Contender, Run, Verdict, judge_values, relative_error
from bench.diffusion import few_scores, gradient_of, judge_draws, judge_seeded, seeded
from bench.log_onehot import gumbel_argmax
from vqfast import ops
from vqfast.diffusion.schedules import gaussian_betas
from vqfast.kernels.matrix_loss import reference
from vqfast.kernels.spec import generator
from vqfast.kernels.specs import MATRIX_LOSS, MATRIX_SAMPLE

_LEAST = 1e-30


class MatrixProblem:
    """Codes x0 and their noised x_t (B, L), levels t and s (B,), scores of x0 (B, L, K), the family and its matrices of
    each level and each step, (T + 1, K, K) and (T, K, K) float64.
    """

    def __init__(self, shape: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int):
        B, L, K, T = (shape[key] for key in "BLKT")
        g = generator(device, seed)
        self.K = K
        # D3PM's widths for 256 grey levels, and what comes to the same for other K.
        wider = (255 / (K - 1)) ** 2
        betas = gaussian_betas(T, first=1e-4 * wider, last=0.02 * wider)
        self.transition = ops.Gaussian(K, betas.to(device))
        self.t = torch.randint(1, T + 1, (B,), generator=g, device=device)
        self.s = (self.t - shape.get("step", 1)).clamp(min=0)
        self.x0 = torch.randint(K, (B, L), generator=g, device=device)
        self.x_t = ops.q_sample(self.x0, self.t, self.transition, generator=g)
        self.logits = (torch.randn(B, L, K, generator=g, device=device) * 2).to(dtype)

    def between(self, s: Tensor | None, t: Tensor) -> Tensor:
        """(n, K, K) float64 from levels s (n,) to t; s None for the data."""
        codes = torch.arange(self.K, device=t.device).expand(t.shape[0], self.K)
        return self.transition.product(codes, s, t)

    def exact(self) -> tuple[Tensor, Tensor]:
        """`prior` and `likelihood` of the definition."""
        return self.between(None, self.s), self.between(self.s, self.t).mT


# ---- the published form ----------------------------------------------------------------------------------------------


class Stacks:
    """Matrices of every level, and of the steps between the levels that the problem asks for, float32."""

    def __init__(self, p: MatrixProblem, shape: Mapping[str, Any]):
        levels = torch.arange(shape["T"] + 1, device=p.t.device)
        step = shape.get("step", 1)
        self.levels = torch.cat([p.between(None, some).float() for some in levels.split(64)])
        # Transposed, so that what leads to a code is a row.
        parts = [p.between((some - step).clamp(min=0), some).mT.float() for some in levels.split(64)]
        self.steps = torch.cat(parts).contiguous()


def log_posterior(m: Tensor, x_t: Tensor, t: Tensor, stacks: Stacks) -> Tensor:
    """log q(x_s | x_t) of the distribution m (B, L, K) of x_s given x_0, or its prediction (eq. 3)."""
    f = stacks.steps[t[:, None], x_t]
    return ((f + _LEAST).log() + (m + _LEAST).log()).log_softmax(-1)


def eager_loss(logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, stacks: Stacks) -> Tensor:
    """Mean over tokens of the KL; at s = 0 it is that of a one-hot, the negative log-likelihood."""
    log_true = log_posterior(stacks.levels[s[:, None], x0], x_t, t, stacks)
    log_model = log_posterior(logits.float().softmax(-1) @ stacks.levels[s], x_t, t, stacks)
    return (log_true.exp() * (log_true - log_model)).sum(-1).mean()


def eager_p_sample(logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor, stacks: Stacks) -> Tensor:
    return gumbel_argmax(log_posterior(logits.float().softmax(-1) @ stacks.levels[s], x_t, t, stacks), -1)


# ---- loss ------------------------------------------------------------------------------------------------------------


def _vqfast_loss(p: MatrixProblem):
    return gradient_of(lambda logits: ops.diffusion_loss(logits, p.x0, p.x_t, p.t, p.transition, s=p.s), p.logits)


def _eager_loss(p: MatrixProblem, shape: Mapping[str, Any], loss) -> Run:
    stacks = Stacks(p, shape)
    return Run(gradient_of(lambda logits: loss(logits, p.x0, p.x_t, p.t, p.s, stacks), p.logits))


def _cross_entropy(p: MatrixProblem) -> Run:
    target = p.x0.flatten()
    return Run(gradient_of(lambda logits: F.cross_entropy(logits.flatten(0, 1), target), p.logits))


def _judge_loss(contender: Contender, run: Run, p: MatrixProblem) -> Verdict:
    loss, grad = run.call()
    if contender.role == YARDSTICK:
        return Verdict()
    args = (p.logits.double(), p.x0, p.x_t, p.s, *p.exact(), False, 0.0)
    errors = {
        "loss": relative_error(loss, reference.matrix_loss(*args).mean()),
        "gradient": relative_error(grad, reference.matrix_loss_grad(*args) / p.x0.numel()),
    }
    return judge_values(contender, errors, ours=1e-5, theirs=1e-3)


def matrix_loss_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    version = torch.__version__
    compiled = torch.compile(eager_loss, dynamic=False)
    needed = ("matrix_loss", "scale_rows_")
    contenders = vqfast_backends(device, needed, _vqfast_loss, reference=few_scores(shape, device)) + [
        Contender("torch, all matrices kept", PEER, lambda p: _eager_loss(p, shape, eager_loss), version),
        Contender(
            "torch.compile(all matrices kept)", PEER, lambda p: _eager_loss(p, shape, compiled), version, compiled=True
        ),
        Contender("torch cross_entropy (another loss)", YARDSTICK, _cross_entropy, version),
    ]
    return Case(
        op="matrix_loss",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: MatrixProblem(shape, dtype, device, seed),
        judge=_judge_loss,
        contenders=tuple(contenders),
        bytes_moved=MATRIX_LOSS.bytes_moved(shape, dtype),
        flops=MATRIX_LOSS.flops(shape),
    )


# ---- samples ---------------------------------------------------------------------------------------------------------


def _vqfast_p_sample(p: MatrixProblem) -> Run:
    def draw(generator: torch.Generator | None = None) -> Tensor:
        return ops.p_sample(p.logits, p.x_t, p.t, p.s, p.transition, generator=generator)

    return Run(draw, evidence=lambda: draw(seeded(p.x0.device)))


def _eager_p_sample(p: MatrixProblem, shape: Mapping[str, Any], sample) -> Run:
    stacks = Stacks(p, shape)
    return Run(lambda: sample(p.logits, p.x_t, p.t, p.s, stacks))


def _judge_p_sample(contender: Contender, run: Run, p: MatrixProblem) -> Verdict:
    log_p = ops.posterior(p.logits.double(), p.x_t, p.t, p.s, p.transition)
    verdict = judge_draws(log_p, run.call(), p.x_t)
    # A draw within rounding of the boundary between two codes may fall on either side.
    allowed = 1 + p.x0.numel() // 1000
    return verdict if verdict.wrong else judge_seeded(contender, run, _vqfast_p_sample(p).evidence, allowed)


def matrix_sample_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    version = torch.__version__
    compiled = torch.compile(eager_p_sample, dynamic=False)
    needed, few = ("matrix_sample",), few_scores(shape, device)
    contenders = vqfast_backends(device, needed, _vqfast_p_sample, reference=few) + [
        Contender("torch, all matrices kept", PEER, lambda p: _eager_p_sample(p, shape, eager_p_sample), version),
        Contender(
            "torch.compile(all matrices kept)",
            PEER,
            lambda p: _eager_p_sample(p, shape, compiled),
            version,
            compiled=True,
        ),
    ]
    return Case(
        op="matrix_sample",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: MatrixProblem(shape, dtype, device, seed),
        judge=_judge_p_sample,
        contenders=tuple(contenders),
        bytes_moved=MATRIX_SAMPLE.bytes_moved(shape, dtype),
        flops=MATRIX_SAMPLE.flops(shape),
    )
