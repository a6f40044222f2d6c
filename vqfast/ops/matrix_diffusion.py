"""The ops of discrete diffusion on families through matrices, in float64: products, and what is done to their rows."""

import torch
from torch import Tensor

from vqfast.kernels.p_sample.reference import guided, likely
from vqfast.kernels.philox import philox, uniform
from vqfast.ops.matrix_transitions import MatrixTransition, SymmetricRate


def _draw(weight: Tensor, quantile: Tensor) -> Tensor:
    """(B, L) codes: the first whose cumulative weight (B, L, K) exceeds `quantile` (B, L) of the total."""
    cumulative = weight.cumsum(-1)
    drawn = (cumulative <= (quantile * cumulative[..., -1])[..., None]).sum(-1)
    # Rounding can leave the quantile at the very end: then the last code that has any weight.
    last = weight.shape[-1] - 1 - (weight > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(drawn, last)


def _quantile(key: Tensor, codes: Tensor) -> Tensor:
    """(B, L) float64: the first integer of draw 0 of row b * L + l."""
    rows = torch.arange(codes.numel(), device=codes.device).reshape(codes.shape)
    return uniform(philox(key, rows, 0)[0])


def q_sample(x0: Tensor, t: Tensor, transition: MatrixTransition, key: Tensor) -> Tensor:
    """x_t ~ row x_0 of Q_1 ... Q_t; at t = 0 exactly x_0."""
    return _draw(transition.product(x0, None, t), _quantile(key, x0))


def _log(x: Tensor) -> Tensor:
    """log x, -inf at 0, and there without a gradient."""
    possible = x > 0
    return torch.where(possible, x.where(possible, 1.0).log(), -torch.inf)


def likelihood(x_t: Tensor, t: Tensor, s: Tensor, transition: MatrixTransition, span: int) -> Tensor:
    """(B, L, K): q(x_t | x_s = j) for every j, column x_t of the transition."""
    return transition.product(x_t, s, t, transpose=True, span=span)


def _refuse_marginal(transition: MatrixTransition) -> None:
    if isinstance(transition, SymmetricRate):
        raise ValueError(
            f"rule: expected 'joint' for {transition}, got 'marginal', which divides by probabilities that it knows to "
            "an absolute error only; its matrices as vqfast.ops.Dense take both rules"
        )


def _marginal(log_p: Tensor, x_t: Tensor, t: Tensor, transition: MatrixTransition) -> Tensor:
    """log p(x_0) whose joint posterior is the marginal posterior of `log_p`: p_k / q(x_t | x_0 = k), normalised.

    An x_0 that cannot have led to x_t has no posterior of x_s, and no weight.
    """
    log_q = _log(transition.product(x_t, None, t, transpose=True))
    possible = log_q > -torch.inf
    return torch.log_softmax(torch.where(possible, log_p - log_q.where(possible, 0), -torch.inf), dim=-1)


def _log_rows(log_p: Tensor, s: Tensor, transition: MatrixTransition) -> Tensor:
    """log sum_k p_k q(x_s | x_0 = k); at s = 0 log_p itself, which may be below what its exponential can hold."""
    rows = _log(transition.product(log_p.exp(), None, s))
    return torch.where((s == 0)[:, None, None], log_p, rows)


def posterior(
    logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor, transition: MatrixTransition, marginal: bool, span: int
) -> Tensor:
    """(B, L, K) float64: log p(x_s | x_t)."""
    log_p = torch.log_softmax(logits.double(), dim=-1)
    if marginal:
        _refuse_marginal(transition)
        log_p = _marginal(log_p, x_t, t, transition)
    return torch.log_softmax(_log(likelihood(x_t, t, s, transition, span)) + _log_rows(log_p, s, transition), dim=-1)


def token_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    transition: MatrixTransition,
    marginal: bool,
    aux_weight: float,
    span: int,
) -> Tensor:
    """(B, L) float64: KL(q(x_s | x_t, x_0) || p(x_s | x_t)) - aux_weight log p(x_0).

    The likelihood of x_t is a factor of both posteriors and leaves their ratio but for the normalisers.
    """
    log_p = torch.log_softmax(logits.double(), dim=-1)
    auxiliary = log_p.gather(-1, x0[..., None])[..., 0] if aux_weight else None
    if marginal:
        _refuse_marginal(transition)
        log_p = _marginal(log_p, x_t, t, transition)
    log_f = _log(likelihood(x_t, t, s, transition, span))
    log_true = log_f + _log(transition.product(x0, None, s))
    log_model = log_f + _log_rows(log_p, s, transition)
    true = torch.softmax(log_true, dim=-1)
    # 0 log 0 = 0: both logarithms are replaced before the product, so that no gradient meets 0 * inf either. A pair of
    # x_0 and x_t that the chain cannot give has no posterior: NaN, which is not above 0 but is not 0 either.
    nothing = true == 0
    kl = (true * (torch.log_softmax(log_true, -1) - torch.log_softmax(log_model, -1)).masked_fill(nothing, 0)).sum(-1)
    return kl if auxiliary is None else kl - aux_weight * auxiliary


def p_sample(
    logits: Tensor,
    unconditional: Tensor | None,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    transition: MatrixTransition,
    known: Tensor | None,
    marginal: bool,
    temperature: float,
    guidance: float,
    top_k: int,
    top_p: float,
    key: Tensor,
    span: int,
) -> Tensor:
    """(B, L) int64: x_s by inversion of the whole posterior; one random number a token, whichever code it takes."""
    scores = guided(logits.double(), None if unconditional is None else unconditional.double(), guidance) / temperature
    log_p = torch.log_softmax(scores, dim=-1)
    if top_k or top_p < 1:
        log_p = log_p.where(likely(scores, top_k, top_p), -torch.inf)
        log_p = torch.log_softmax(log_p, dim=-1)
    if marginal:
        _refuse_marginal(transition)
        log_p = _marginal(log_p, x_t, t, transition)
    weight = torch.softmax(_log(likelihood(x_t, t, s, transition, span)) + _log_rows(log_p, s, transition), dim=-1)
    quantile = _quantile(key, x_t)
    # Scores that are no distribution (NaN), or a prediction from which x_t cannot come, leave the token as it is.
    x_s = torch.where(weight.isnan().any(-1), x_t, _draw(weight, quantile))
    if known is not None:
        noised = _draw(transition.product(known.clamp(min=0), None, s), quantile)
        x_s = torch.where(known >= 0, noised, x_s)
    return x_s


def prior_kl(transition: MatrixTransition) -> Tensor:
    """(K,) float64: KL(q(x_T | x_0 = k) || prior)."""
    q, prior = transition.last_rows(), transition.prior()
    return torch.special.xlogy(q, q / prior.where(prior > 0, 1.0)).sum(1)
