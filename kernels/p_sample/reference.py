"""Definition of the reverse step: one draw of x_s from the posterior of the predicted x_0."""

import torch
from torch import Tensor

from vqfast.kernels.philox import philox, uniform
from vqfast.kernels.posterior.reference import step_of
from vqfast.kernels.q_sample.reference import draw_code, noised


def guided(logits: Tensor, unconditional: Tensor | None, guidance: float) -> Tensor:
    """unconditional + guidance (logits - unconditional); a code that either calls impossible stays so."""
    if unconditional is None:
        return logits
    impossible = (logits == -torch.inf) | (unconditional == -torch.inf)
    return (unconditional + guidance * (logits - unconditional)).masked_fill(impossible, -torch.inf)


def likely(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which codes a truncated draw may take, bool: the top_k largest scores, and of these the smallest set of the
    largest whose share of their probability is at least top_p. Of equal scores those of the lowest index come first.
    """
    K = scores.shape[-1]
    order = scores.sort(dim=-1, descending=True, stable=True)
    p = torch.softmax(order.values, dim=-1)
    if 0 < top_k < K:
        p[..., top_k:] = 0
    if top_p < 1:
        before = p.cumsum(-1) - p
        p = p.where(before < top_p * p.sum(-1, keepdim=True), 0)
    return torch.zeros_like(p).scatter(-1, order.indices, p) > 0


def p_sample(
    logits: Tensor,
    unconditional: Tensor | None,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    levels: Tensor,
    noise: Tensor | None,
    known: Tensor | None,
    marginal: bool,
    temperature: float,
    guidance: float,
    top_k: int,
    top_p: float,
    key: Tensor,
) -> Tensor:
    """x_s ~ p(x_s | x_t), the posterior of the predicted x_0 (kernels/posterior).

    It is a mixture that can be drawn without building it: x_s = x_t, a code of the noise, a code of the prediction.
    For a code x_t = i, with the names of `Step`, their weights are stay (signal p_i + noise_i), move (1 - signal) and
    move signal; for the mask state gamma_bar_s / gamma_bar_t, and the rest split as 1 - signal to signal.
    Hoogeboom et al. 2021, eq. 14; steps to any s < t by the composition of the chain.

    Args:
        logits: (B, L, K) scores of x_0.
        unconditional: (B, L, K) scores of x_0 without a condition: the scores used are unconditional + guidance
            (logits - unconditional) (classifier-free guidance, Ho and Salimans 2022). None: `logits` alone.
        x_t: (B, L) int64 codes, or K for the mask state.
        t, s: (B,) int64 noise levels, 0 <= s < t <= T.
        levels, noise, marginal: as for the posterior.
        known: (B, L) int64 clean codes that are given, -1 elsewhere; a given position is drawn from q(x_s | known).
        temperature: divides the scores, > 0.
        top_k: keep this many codes of the largest p(x_0); 0 keeps all.
        top_p: of these keep the smallest set of the largest with at least this share; 1 keeps all.
        key: (2,) int64 Philox key. Row b * L + l: draw 0 gives the integers that choose the part (first) and the code
            of the noise (second); draw 1's first integer chooses within p, in the order of the codes: the first
            code whose cumulative probability exceeds it.

    Returns:
        (B, L) int64. Where the scores are no distribution (NaN, all -inf) a code stays and a token that leaves the
        mask state takes a code of the noise.
    """
    K = logits.shape[-1]
    rows = torch.arange(x_t.numel(), device=x_t.device).reshape(x_t.shape)
    part, any_code = philox(key, rows, 0)
    within, _ = philox(key, rows, 1)
    part, any_code, within = uniform(part), draw_code(any_code, K, noise), uniform(within)

    scores = guided(logits.double(), None if unconditional is None else unconditional.double(), guidance) / temperature
    weight = (scores - scores.amax(-1, keepdim=True)).exp()
    valid = weight.sum(-1).isfinite() & (weight.sum(-1) > 0)
    if top_k or top_p < 1:
        weight = weight.where(likely(scores, top_k, top_p), 0)
    step = step_of(x_t, t, s, levels, noise, K)
    if marginal:
        weight = weight.scatter(-1, step.code, weight.gather(-1, step.code) * (-step.shift).exp())
    total = weight.sum(-1)

    masked, signal = step.masked[..., 0], step.signal[..., 0]
    stay_share, move, flip = step.stay[..., 0], step.move[..., 0], step.flip[..., 0]
    p_i = weight.gather(-1, step.code)[..., 0] / total
    noise_i = step.noise.expand_as(weight).gather(-1, step.code)[..., 0]
    stay = torch.where(masked, 1 - flip, stay_share * (signal * p_i + noise_i))
    moving = torch.where(masked, flip, move)
    replace, predict = moving * (1 - signal), moving * signal
    target = part * (stay + replace + predict)

    cumulative = weight.cumsum(-1)
    drawn = (cumulative <= (within * total)[..., None]).sum(-1)
    # Rounding can leave the target at the very end: then the last code that has any weight.
    last = K - 1 - (weight > 0).flip(-1).to(torch.uint8).argmax(-1)
    drawn = torch.where(valid, torch.minimum(drawn, last), any_code)

    stays = torch.where(step.certain[..., 0] | (~valid & ~masked), True, target < stay)
    x_s = torch.where(stays, x_t, torch.where(target < stay + replace, any_code, drawn))
    if known is not None:
        x_s = torch.where(known >= 0, noised(part, any_code, known, s, levels, K), x_s)
    return x_s
