"""The training side of discrete diffusion: which level to noise to, the objective, the bound."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.diffusion.sampler import Denoiser, sample_steps
from vqfast.ops import Transition, diffusion_loss, prior_kl, q_sample
from vqfast.ops.diffusion import RULES

PARAMETERISATIONS = ("x0", "residual")
TIME_SAMPLING = ("uniform", "importance")
WEIGHTINGS = ("elbo", "reweighted")
AUX_SCHEDULES = ("constant", "adaptive")

# Importance sampling of t as in the code released with Multinomial Diffusion (Hoogeboom et al. 2021).
_HISTORY_DECAY = 0.9
_VISITS_BEFORE_USE = 10


class Objective(NamedTuple):
    """What a training step gives.

    loss: scalar with gradient, bits per token: sum over t of the bound's terms (plus the auxiliary
        cross-entropy), estimated from one t per sample, plus the prior term; or the reweighted bound.
    bits_per_dim: scalar without gradient: the bound, without the auxiliary term and whatever the weighting.
    """

    loss: Tensor
    bits_per_dim: Tensor


class Elbo(NamedTuple):
    """The negative evidence lower bound of each sample, in nats, summed over its tokens.

    total: (B,), the sum of all that follows.
    terms: (n, B), in the order of the reverse chain: the last is -log p(x_0 | x_t).
    prior: (B,), KL(q(x_T | x_0) || prior).
    """

    total: Tensor
    terms: Tensor
    prior: Tensor


class DiscreteDiffusion(nn.Module):
    """Turns a denoiser into training losses and bounds.

    Args:
        transition: the forward chain, of any family, in closed form or through matrices.
        rule: "joint" or "marginal", see vqfast.ops.posterior. Sample with the same one.
        parameterisation: "x0": the denoiser's output is the logits of x_0; "residual": it is added to the
            one-hot of x_t, so that the denoiser predicts the noise (VQ-DDM, arXiv 2112.01799); a masked x_t adds
            nothing.
        aux_weight: weight of the cross-entropy of x_0 beside the bound (D3PM, Austin et al. 2021, eq. 5).
        aux_schedule: "constant"; or "adaptive": times 2 - (t - 1) / T, twice at the first level, hardly more than
            once at the last (the code released with VQ-Diffusion, Gu et al. 2022, whose levels start at 0). That takes
            a pass over the logits more.
        time_sampling: how t is drawn. "uniform"; or "importance": p(t) proportional to the root of a running
            mean of the squared loss at t, uniform until every t was visited more than 10 times.
        weighting: "elbo" trains on the bound; "reweighted" on the mean over t of (1 - t / T) times
            -log p(x_0 | x_t), which makes light of levels where little is known (Bond-Taylor et al. 2022, Unleashing
            Transformers, eq. 8): in absorbing diffusion the cross-entropy of the masked tokens.

    Buffers, saved with the model: loss_history (T,) float32, running mean of the squared loss (nats of a
    sample) at t = 1..T; loss_count (T,) int64, visits.

    Raises:
        ValueError: an option other than these; a bound that is infinite, as that of absorbing diffusion whose alpha_bar
            does not end at 0.
    """

    def __init__(
        self,
        transition: Transition,
        *,
        rule: str = "joint",
        parameterisation: str = "x0",
        aux_weight: float = 0.0,
        aux_schedule: str = "constant",
        time_sampling: str = "uniform",
        weighting: str = "elbo",
    ):
        super().__init__()
        if parameterisation not in PARAMETERISATIONS:
            raise ValueError(
                f"parameterisation: expected one of {', '.join(PARAMETERISATIONS)}, got {parameterisation!r}"
            )
        if time_sampling not in TIME_SAMPLING:
            raise ValueError(f"time_sampling: expected one of {', '.join(TIME_SAMPLING)}, got {time_sampling!r}")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
        if aux_schedule not in AUX_SCHEDULES:
            raise ValueError(f"aux_schedule: expected one of {', '.join(AUX_SCHEDULES)}, got {aux_schedule!r}")
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
        if not aux_weight >= 0:
            raise ValueError(f"aux_weight: expected at least 0, got {aux_weight!r}")
        self.transition = transition
        self.rule = rule
        prior = prior_kl(transition)
        if weighting == "elbo" and prior.isinf().all():
            raise ValueError(
                f"transition: the bound of {transition} is infinite, as its prior has nothing of x_0; "
                f"expected alpha_bar to end at 0, got {transition.alpha_bar[-1].item():.3g}"
            )
        # Of each code, in nats, by device: as the chain's tables no part of the module, whose casts would round it and
        # whose `to_empty` would leave nothing of it.
        self._prior_kl = {prior.device: prior}
        self.parameterisation = parameterisation
        self.aux_weight = float(aux_weight)
        self.aux_schedule = aux_schedule
        self.time_sampling = time_sampling
        self.weighting = weighting
        self.register_buffer("loss_history", torch.zeros(transition.T))
        self.register_buffer("loss_count", torch.zeros(transition.T, dtype=torch.int64))
        self.accumulating = False
        self._noted: Tensor | None = None  # (2, T) number of samples, and sum of their squared losses

    def predict(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of x_0, (B, L, K), from codes x_t (B, L) at levels t (B,)."""
        logits = denoiser(x_t, t, labels)
        if self.parameterisation == "residual":
            index = x_t[..., None]
            is_code = (index < logits.shape[-1]).to(logits.dtype)
            logits = logits.scatter_add(-1, index.clamp(max=logits.shape[-1] - 1), is_code)
        return logits

    def time_probabilities(self) -> Tensor:
        """p(t) for t = 1..T, (T,) float64."""
        uniform = torch.full_like(self.loss_history, 1 / self.transition.T, dtype=torch.float64)
        if self.time_sampling == "uniform":
            return uniform
        weight = (self.loss_history.double() + 1e-10).sqrt() + 1e-4
        # The decoder term t = 1 is far larger than its neighbours: it borrows the weight of t = 2.
        weight = torch.cat([weight[1:2], weight[1:]]) if self.transition.T > 1 else weight
        ready = (self.loss_count > _VISITS_BEFORE_USE).all()
        return torch.where(ready, weight / weight.sum(), uniform)

    def draw_t(self, batch: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Levels t (batch,) int64 and their probabilities p(t) (batch,) float64.

        One random number u serves the whole batch: sample i stands at the quantile u + i / batch, modulo 1
        (the low-variance draw of Kingma et al. 2021, Variational Diffusion Models). Each t follows p(t), and
        together they cover it evenly.
        """
        device = self.loss_history.device
        source = device if generator is None else generator.device
        u = torch.rand((), generator=generator, dtype=torch.float64, device=source).to(device)
        quantile = (u + torch.arange(batch, dtype=torch.float64, device=device) / batch) % 1.0
        p = self.time_probabilities()
        index = torch.searchsorted(p.cumsum(0), quantile, right=True).clamp(max=self.transition.T - 1)
        return index + 1, p[index]

    @torch.no_grad()
    def record(self, t: Tensor, nats: Tensor) -> None:
        """Note the losses nats (B,) of samples at levels t (B,), for importance sampling.

        Samples that share a t enter with the mean of their squares, those of other processes among them: their order
        does not matter, and every process ends with the same history. Inside `accumulate_history` they are kept
        until its end.
        """
        level = torch.arange(1, self.transition.T + 1, device=t.device)
        at = (t == level[:, None]).to(self.loss_history.dtype)  # (T, B)
        noted = torch.stack([at.sum(1), (at * nats.to(at.dtype).square()).sum(1)])
        self._noted = noted if self._noted is None else self._noted + noted
        if not self.accumulating:
            self.update_history()

    @torch.no_grad()
    def update_history(self) -> None:
        """Take in all that was recorded since the last time, if anything; with several processes one all-reduce."""
        if self._noted is None:
            return
        noted, self._noted = self._noted, None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(noted)
        count, total = noted
        history = _HISTORY_DECAY * self.loss_history + (1 - _HISTORY_DECAY) * total / count.clamp(min=1)
        self.loss_history.copy_(torch.where(count > 0, history, self.loss_history))
        self.loss_count.add_(count.to(self.loss_count.dtype))

    def objective(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, p_t: Tensor) -> tuple[Objective, Tensor]:
        """The estimate of the bound from one noised version of each sample.

        Args:
            logits: (B, L, K) scores of x_0. x0, x_t: (B, L) int64. t: (B,) int64 in 1..T. p_t: (B,), the
                probability with which each t was drawn.

        Returns:
            The objective; and (B,) the loss of each sample at its t, nats summed over tokens, no gradient.
        """
        B, L = x0.shape
        T, bits_per_nat = self.transition.T, 1 / (max(B * L, 1) * math.log(2))
        prior = self._prior_nats(x0).sum() * bits_per_nat
        common = dict(transition=self.transition, rule=self.rule, reduction="none")

        aux_weight = self.aux_weight if self.aux_schedule == "constant" else 0.0
        # With every factor in the weights, the gradient that reaches the op is 1 and costs it no second pass.
        if self.weighting == "elbo":
            weights = bits_per_nat / p_t
            tokens = diffusion_loss(logits, x0, x_t, t, weights=weights, aux_weight=aux_weight, **common)
            loss = tokens.sum() + prior.to(tokens.dtype)
        else:
            weights = bits_per_nat * (1 - t.double() / T) / (T * p_t)
            loss = diffusion_loss(logits, x0, x_t, t, s=0, weights=weights, aux_weight=aux_weight, **common).sum()
        if self.aux_weight and self.aux_schedule == "adaptive":
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            cross_entropy = F.cross_entropy(scores.transpose(1, 2), x0, reduction="none")
            adaptive = weights * self.aux_weight * (2 - (t.double() - 1) / T)
            loss = loss + (adaptive.to(scores.dtype)[:, None] * cross_entropy).sum()
        if aux_weight or self.weighting != "elbo":
            with torch.no_grad():
                weights = bits_per_nat / p_t
                tokens = diffusion_loss(logits, x0, x_t, t, weights=weights, **common)
        samples = tokens.detach().sum(1)
        return Objective(loss, samples.sum() + prior.to(samples.dtype)), samples / weights.to(samples.dtype)

    def _prior_nats(self, x0: Tensor) -> Tensor:
        """(B,) float64."""
        prior = self._prior_kl.get(x0.device)
        if prior is None:
            prior = self._prior_kl[x0.device] = next(iter(self._prior_kl.values())).to(x0.device)
        return prior[x0].sum(1)

    def forward(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Objective:
        """One training step's objective: draw t, noise x0 to it, predict, compare.

        In training mode the losses are recorded for importance sampling. No host sync.

        Args:
            denoiser: maps (x_t (B, L) int64, t (B,) int64, labels) to (B, L, K).
            x0: (B, L) int64 codes in [0, K).
            labels: handed to the denoiser.
            generator: source of the random numbers.

        Raises:
            TypeError, ValueError: shapes, dtypes or values that the ops refuse, with their text.
        """
        t, p_t = self.draw_t(x0.shape[0], generator=generator)
        x_t = q_sample(x0, t, self.transition, generator=generator)
        logits = self.predict(denoiser, x_t, t, labels)
        objective, nats = self.objective(logits, x0, x_t, t, p_t)
        if self.training and self.time_sampling == "importance":
            self.record(t, nats)
        return objective

    @torch.no_grad()
    def elbo(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        labels: Tensor | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Elbo:
        """The bound on -log p(x0), term by term, each estimated from one draw of x_t.

        Args:
            denoiser, x0, labels, generator: as for a training step.
            steps: None for the T-step model. With n, the bound of the model that samples in n evenly spaced
                exact skips: a bound as valid, and looser.

        Raises:
            ValueError: steps not in 1..T, or what the ops refuse.
        """
        B = x0.shape[0]
        terms = []
        for t, s in pairwise(sample_steps(self.transition.T, steps)):
            x_t = q_sample(x0, t, self.transition, generator=generator)
            level = torch.full((B,), t, dtype=torch.int64, device=x0.device)
            logits = self.predict(denoiser, x_t, level, labels)
            loss = diffusion_loss(logits, x0, x_t, level, self.transition, s=s, rule=self.rule, reduction="none")
            terms.append(loss.double().sum(1))
        prior = self._prior_nats(x0)
        stacked = torch.stack(terms)
        return Elbo(stacked.sum(0) + prior, stacked, prior)

    def bits_per_dim(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        labels: Tensor | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`elbo` in bits per token: (B,) float64."""
        total = self.elbo(denoiser, x0, labels, steps=steps, generator=generator).total
        return total / (x0.shape[1] * math.log(2))

    def extra_repr(self) -> str:
        aux = f", aux_weight={self.aux_weight} ({self.aux_schedule})" if self.aux_weight else ""
        return (
            f"{self.transition}, rule={self.rule!r}, parameterisation={self.parameterisation!r}, "
            f"time_sampling={self.time_sampling!r}, weighting={self.weighting!r}{aux}"
        )


@contextmanager
def accumulate_history(model: nn.Module) -> Iterator[None]:
    """One step of every loss history for all training passes within, at the end: gradient accumulation.

    Args:
        model: any module; its DiscreteDiffusion, wherever they are. Every process enters and leaves alike.
    """
    found = [module for module in model.modules() if isinstance(module, DiscreteDiffusion)]
    for diffusion in found:
        diffusion.accumulating = True
    try:
        yield
    finally:
        for diffusion in found:
            diffusion.accumulating = False
    for diffusion in found:
        diffusion.update_history()
