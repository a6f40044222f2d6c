"""Multinomial diffusion as it is usually written (Hoogeboom et al. 2021, eqs. 12-15): the eager peers.

Every distribution is a dense (B, K, L) tensor of logarithms, mixed with logaddexp, drawn from by adding Gumbel noise.
Where there is a mask state it is one class more, as in the code released with VQ-Diffusion.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Levels(NamedTuple):
    """Logarithms of the shares of a stretch of the chain, float32: kept (B, 1, 1); what each code gets of the noise,
    (B, 1, 1) or (B, K, 1); masked (B, 1, 1), None where there is no mask state.
    """

    kept: Tensor
    noise: Tensor
    masked: Tensor | None = None


def log_levels(alpha: Tensor, K: int, gamma: Tensor | None = None, noise: Tensor | None = None) -> Levels:
    """(B,) shares that are kept and masked, float64, and (K,) distribution of replaced codes."""
    replaced = (1 - alpha if gamma is None else 1 - alpha - gamma)[:, None, None]
    share = replaced / K if noise is None else replaced * noise[:, None]
    masked = None if gamma is None else gamma.clamp(min=1e-40).log().float()[:, None, None]
    return Levels(alpha.clamp(min=1e-40).log().float()[:, None, None], share.clamp(min=1e-40).log().float(), masked)


def log_onehot(x: Tensor, K: int) -> Tensor:
    """(B, L) codes to (B, K, L) log-probabilities, finite where they should be minus infinity."""
    return F.one_hot(x, K).transpose(1, 2).float().clamp(min=1e-30).log()


def log_mix(log_p: Tensor, levels: Levels) -> Tensor:
    """Log-probabilities of codes, (B, K, L), carried through the chain: (B, K, L), or (B, K + 1, L) with a mask."""
    codes = torch.logaddexp(log_p + levels.kept, levels.noise)
    if levels.masked is None:
        return codes
    return torch.cat([codes, levels.masked.expand(-1, 1, codes.shape[2])], 1)


def log_arrival(x_t: Tensor, K: int, levels: Levels) -> Tensor:
    """log q(x_t | x_s) for every x_s, the states in the middle: the other way through the same chain."""
    if levels.masked is None and levels.noise.shape[1] == 1:
        return log_mix(log_onehot(x_t, K), levels)
    L = x_t.shape[1]
    if levels.masked is None:
        drawn = levels.noise.expand(-1, -1, L).gather(1, x_t[:, None])
        return torch.logaddexp(log_onehot(x_t, K) + levels.kept, drawn)
    gone = (x_t == K)[:, None]
    codes = torch.logaddexp(log_onehot(x_t, K + 1)[:, :K] + levels.kept, torch.where(gone, levels.masked, levels.noise))
    return torch.cat([codes, torch.where(gone, 0.0, -69.0)], 1)


def eager_posterior(log_x0: Tensor, x_t: Tensor, step: Levels, past: Levels) -> Tensor:
    """log q(x_s | x_t, x0), `step` the levels of t given s and `past` those of s (eq. 14)."""
    joint = log_mix(log_x0, past) + log_arrival(x_t, log_x0.shape[1], step)
    return joint - joint.logsumexp(1, keepdim=True)


def eager_loss(logits: Tensor, x0: Tensor, x_t: Tensor, step: Levels, past: Levels, last: Tensor) -> Tensor:
    """Mean over tokens of the KL, or of -log p(x0 | x_t) where `last` (B,) says that s is 0 (eqs. 13-15)."""
    K = logits.shape[1]
    log_x0 = log_onehot(x0, K)
    log_true = eager_posterior(log_x0, x_t, step, past)
    log_model = eager_posterior(logits.float().log_softmax(1), x_t, step, past)
    kl = (log_true.exp() * (log_true - log_model)).sum(1)
    likelihood = -(log_x0.exp() * log_model[:, :K]).sum(1)
    return torch.where(last[:, None], likelihood, kl).mean()


def gumbel_argmax(log_p: Tensor, dim: int = 1) -> Tensor:
    noise = torch.rand_like(log_p)
    return (log_p - (-(noise + 1e-30).log() + 1e-30).log()).argmax(dim)


def eager_p_sample(logits: Tensor, x_t: Tensor, step, past) -> Tensor:
    log_model = eager_posterior(logits.float().log_softmax(1), x_t, step, past)
    return gumbel_argmax(log_model)


def eager_q_sample(x0: Tensor, levels, K: int) -> Tensor:
    return gumbel_argmax(log_mix(log_onehot(x0, K), levels))


def replace_q_sample(x0: Tensor, alpha: Tensor, K: int) -> Tensor:
    """Keep a token or draw another: what the eager form comes to when one thinks first."""
    keep = torch.rand(x0.shape, device=x0.device) < alpha[:, None]
    return torch.where(keep, x0, torch.randint(K, x0.shape, device=x0.device))
