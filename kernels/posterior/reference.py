"""Definition of the posterior of a step from t to s < t, true or predicted, of every closed-form family."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot


class Step(NamedTuple):
    """A step from t to s as a token at x_t sees it: q(x_s | x_t, x_0) over the codes is, for p a one-hot of x_0,

        (stay [j = x_t] + move) (signal p_j + noise_j) / Z,    Z = move + stay (signal p_{x_t} + noise_{x_t})

    if the token leaves the mask state (probability `flip`; 1 for a code, which never had been masked).

    signal: (B, 1, 1). noise: (B, 1, K). stay, move, flip, shift: (B, L, 1). All of the dtype of `levels`.
    shift: what the marginal rule takes off the logit of x_t.
    masked, certain: (B, L, 1) bool; certain: x_s = x_t whatever x_0 is.
    code: (B, L, 1) int64, x_t where it is a code, else some code.
    """

    signal: Tensor
    noise: Tensor
    stay: Tensor
    move: Tensor
    flip: Tensor
    shift: Tensor
    masked: Tensor
    certain: Tensor
    code: Tensor


def shares(levels: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha_bar, rho_bar (replaced) and gamma_bar (masked) at `level`, of its shape. levels: (T + 1, 1 or 2)."""
    alpha = levels[level, 0]
    gamma = levels[level, 1] if levels.shape[1] == 2 else torch.zeros_like(alpha)
    return alpha, ((1 - alpha) - gamma).clamp(min=0), gamma


def noise_vector(noise: Tensor | None, K: int, levels: Tensor) -> Tensor:
    return levels.new_full((K,), 1 / K) if noise is None else noise.to(levels.dtype)


def step_of(x_t: Tensor, t: Tensor, s: Tensor, levels: Tensor, noise: Tensor | None, K: int) -> Step:
    """x_t: (B, L) int64. t, s: (B,) int64, 0 <= s < t <= T."""
    m = noise_vector(noise, K, levels)
    alpha_t, rho_t, gamma_t = (v[:, None, None] for v in shares(levels, t))
    alpha_s, rho_s, gamma_s = (v[:, None, None] for v in shares(levels, s))
    kept = alpha_s + rho_s  # not masked at s
    a = alpha_t / alpha_s
    replaced = ((alpha_t + rho_t) / kept - a).clamp(min=0)

    masked = (x_t == K)[..., None]
    code = x_t.clamp(max=K - 1)[..., None]
    move = torch.where(masked, 1.0, replaced * m[code])
    certain = ~masked & (move == 0)
    return Step(
        signal=alpha_s / kept,
        noise=rho_s / kept * m,
        stay=torch.where(masked, 0.0, a),
        move=move,
        flip=torch.where(masked & (gamma_t > 0), (gamma_t - gamma_s) / gamma_t, 1.0),
        shift=torch.where(masked | certain, 0.0, torch.log1p(alpha_t / (rho_t * m[code]))),
        masked=masked,
        certain=certain,
        code=code,
    )


def shifted(logits: Tensor, step: Step) -> Tensor:
    """The logits whose joint posterior is the marginal posterior of `logits`."""
    return logits.scatter_add(-1, step.code, -step.shift.to(logits.dtype))


def code_posterior(log_p: Tensor, step: Step) -> Tensor:
    """(B, L, K) log-probabilities of x_s, given that it is a code. log_p: (B, L, K), of x_0."""
    dtype = log_p.dtype
    is_x_t = one_hot(step.code[..., 0], log_p.shape[-1])
    likelihood = torch.log(step.stay * is_x_t + torch.where(step.certain, 1.0, step.move)).to(dtype)
    prior = torch.logaddexp(step.signal.log().to(dtype) + log_p, step.noise.log().to(dtype))
    # logaddexp of two minus infinities has a gradient of NaN: at levels without noise the sum is its first term.
    prior = torch.where(step.noise > 0, prior, step.signal.log().to(dtype) + log_p)
    log_q = torch.log_softmax(likelihood + prior, dim=-1)
    return torch.where(step.certain, is_x_t.to(dtype).log(), log_q)


def posterior(
    logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor, levels: Tensor, noise: Tensor | None, marginal: bool
) -> Tensor:
    """log p(x_s | x_t) of predicted scores of x_0.

    Joint rule: p(x_s | x_t) proportional to sum_k q(x_s, x_t | x_0 = k) p_k (D3PM, Austin et al. 2021, eq. 4;
    Multinomial Diffusion, Hoogeboom et al. 2021, eq. 14). Marginal rule: sum_k q(x_s | x_t, x_0 = k) p_k (VQ-Diffusion,
    Gu et al. 2022, eq. 11). The logarithm of a one-hot gives the true posterior by either.

    Args:
        logits: (B, L, K) scores of x_0. x_t: (B, L) int64 codes in [0, K), or K for the mask state.
        t, s: (B,) int64 noise levels, 0 <= s < t <= T.
        levels: (T + 1, 1) float64 alpha_bar, or (T + 1, 2) alpha_bar and gamma_bar of a family with a mask state.
        noise: (K,) float64 distribution of replaced codes; None for 1 / K each.
        marginal: which rule.

    Returns:
        (B, L, K), or (B, L, K + 1) with a mask state; dtype of logits.
    """
    step = step_of(x_t, t, s, levels, noise, logits.shape[-1])
    log_p = torch.log_softmax(shifted(logits, step) if marginal else logits, dim=-1)
    codes = code_posterior(log_p, step) + step.flip.log().to(logits.dtype)
    if levels.shape[1] == 1:
        return codes
    stays_masked = torch.where(step.masked, 1 - step.flip, 0.0).log().to(logits.dtype)
    return torch.cat([codes, stays_masked], dim=-1)


def posterior_backward(
    grad: Tensor,
    logits: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    levels: Tensor,
    noise: Tensor | None,
    marginal: bool,
) -> Tensor:
    """Gradient of `posterior` to its logits.

    Args:
        grad: (B, L, K), or (B, L, K + 1) with a mask state, whose own probability no logit moves.
        logits, x_t, t, s, levels, noise, marginal: as given to `posterior`.

    Returns:
        (B, L, K), dtype of logits; 0 where x_s is certain.
    """
    K = logits.shape[-1]
    step, grad = step_of(x_t, t, s, levels, noise, K), grad[..., :K].to(logits.dtype)
    p = torch.softmax(shifted(logits, step) if marginal else logits, dim=-1)
    predicted, drawn = step.signal.to(p.dtype) * p, step.noise.to(p.dtype)
    moved = grad * torch.where(drawn > 0, predicted / (predicted + drawn), 1)
    stays = step.stay.to(p.dtype) * predicted.gather(-1, step.code)
    normaliser = step.move.to(p.dtype) + step.stay.to(p.dtype) * (predicted + drawn).gather(-1, step.code)
    at_x_t = grad.sum(-1, keepdim=True) * stays / normaliser
    out = moved - p * (moved.sum(-1, keepdim=True) - at_x_t)
    return out.scatter_add(-1, step.code, -at_x_t).masked_fill(step.certain, 0)
