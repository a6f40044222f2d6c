"""Definition of the reverse step of a chain through matrices, in float64: one draw from the whole posterior."""

import torch
from torch import Tensor

from vqfast.kernels.matrix_loss.reference import log, log_prior, marginal, rows_of
from vqfast.kernels.p_sample.reference import guided, likely
from vqfast.kernels.philox import philox, uniform


def draw(weight: Tensor, quantile: Tensor) -> Tensor:
    """(B, L) codes: the first whose cumulative weight (B, L, K) exceeds `quantile` (B, L) of the total."""
    cumulative = weight.cumsum(-1)
    drawn = (cumulative <= (quantile * cumulative[..., -1])[..., None]).sum(-1)
    # Rounding can leave the quantile at the very end: then the last code that has any weight.
    last = weight.shape[-1] - 1 - (weight > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(drawn, last)


def quantiles(key: Tensor, codes: Tensor) -> Tensor:
    """(B, L) float64: the first integer of draw 0 of row b * L + l."""
    rows = torch.arange(codes.numel(), device=codes.device).reshape(codes.shape)
    return uniform(philox(key, rows, 0)[0])


def prediction(
    logits: Tensor, unconditional: Tensor | None, temperature: float, guidance: float, top_k: int, top_p: float
) -> Tensor:
    """(B, L, K) float64: log p(x_0) of the scores, guided, at a temperature, truncated; see kernels/p_sample."""
    scores = guided(logits.double(), None if unconditional is None else unconditional.double(), guidance) / temperature
    log_p = torch.log_softmax(scores, dim=-1)
    if top_k or top_p < 1:
        log_p = torch.log_softmax(log_p.where(likely(scores, top_k, top_p), -torch.inf), dim=-1)
    return log_p


def choose(log_weight: Tensor, x_t: Tensor, key: Tensor) -> Tensor:
    """(B, L) codes drawn from log-probabilities (B, L, K). Scores that are no distribution (NaN), or a prediction from
    which x_t cannot come, leave the token as it is."""
    weight = torch.softmax(log_weight, dim=-1)
    return torch.where(weight.isnan().any(-1), x_t, draw(weight, quantiles(key, x_t)))


def matrix_sample(
    logits: Tensor,
    unconditional: Tensor | None,
    x_t: Tensor,
    s: Tensor,
    prior: Tensor,
    likelihood: Tensor,
    known: Tensor | None,
    marginal_rule: bool,
    temperature: float,
    guidance: float,
    top_k: int,
    top_p: float,
    key: Tensor,
) -> Tensor:
    """x_s ~ p(x_s = j | x_t), proportional to q(x_t | x_s = j) (p prior)_j. D3PM (Austin et al. 2021), eq. 4.

    Args:
        logits, unconditional: (B, L, K) scores of x_0, with and without the condition.
        x_t: (B, L) int64 codes in [0, K).
        s, prior, likelihood, marginal_rule: as for kernels/matrix_loss.
        known: (B, L) int64 clean codes that are given, -1 elsewhere; a given token is drawn from q(x_s | known).
        temperature, guidance, top_k, top_p: as for kernels/p_sample.
        key: (2,) int64 Philox key. The first integer of draw 0 of row b * L + l is the quantile of the token's
            posterior, in the order of the codes: one number, whichever code it takes.

    Returns:
        (B, L) int64. Where the scores are no distribution (NaN), or x_t cannot come from any, the token stays.
    """
    log_p = prediction(logits, unconditional, temperature, guidance, top_k, top_p)
    f = rows_of(likelihood, x_t)
    if marginal_rule:
        log_p = marginal(log_p, f @ prior.mT)
    x_s = choose(log(f) + log_prior(log_p, log_p.exp() @ prior, s), x_t, key)
    if known is not None:
        given = draw(rows_of(prior, known.clamp(min=0)), quantiles(key, x_t))
        x_s = torch.where(known >= 0, given, x_s)
    return x_s
