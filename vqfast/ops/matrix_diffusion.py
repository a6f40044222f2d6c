"""The ops of discrete diffusion on families through matrices, in float64.

Where a sample's matrix is no larger than some of its rows, the matrices from the data to x_s and from x_s to x_t are
made once for a batch and one fused op does the rest: `matrix_loss`, `matrix_sample`. A large codebook sends its rows
through the chain instead, and what is done to them is plain torch.
"""

import torch
from torch import Tensor

from vqfast.kernels.matrix_loss.reference import divergence, log, log_prior
from vqfast.kernels.matrix_loss.reference import marginal as marginal_scores
from vqfast.kernels.matrix_sample.reference import choose, draw, prediction, quantiles
from vqfast.ops.matrix_transitions import MatrixTransition, SymmetricRate
from vqfast.ops.transforms import Function, kept_for_transforms, once_differentiable, scaled_rows, wants_gradient

_matrix_loss = torch.ops.vqfast.matrix_loss.default
_matrix_sample = torch.ops.vqfast.matrix_sample.default

# Where products are made by batches, every sample its own: K for each row up to which matrices are made.
_CODES_PER_ROW = 2


def q_sample(x0: Tensor, t: Tensor, transition: MatrixTransition, key: Tensor) -> Tensor:
    """x_t ~ row x_0 of Q_1 ... Q_t; at t = 0 exactly x_0."""
    return draw(transition.product(x0, None, t), quantiles(key, x0))


def likelihood(x_t: Tensor, t: Tensor, s: Tensor, transition: MatrixTransition, span: int) -> Tensor:
    """(B, L, K): q(x_t | x_s = j) for every j, column x_t of the transition."""
    return transition.product(x_t, s, t, transpose=True, span=span)


def _check_rule(marginal: bool, transition: MatrixTransition) -> None:
    if marginal and isinstance(transition, SymmetricRate):
        raise ValueError(
            f"rule: expected 'joint' for {transition}, got 'marginal', which divides by probabilities that it knows to "
            "an absolute error only; its matrices as vqfast.ops.Dense take both rules"
        )


def _makes_matrices(transition: MatrixTransition, rows: int, passes: int, device: torch.device) -> bool:
    """Whether a matrix for so many rows is less work than sending them through the chain so many times."""
    per_row = transition.codes_per_row(passes) if device.type == "cpu" else _CODES_PER_ROW
    return transition.codebook_size <= per_row * rows


def _matrices(
    t: Tensor, s: Tensor, rows: Tensor, transition: MatrixTransition, passes: int, span: int, one: bool
) -> tuple[Tensor, Tensor] | None:
    """prior and likelihood of `matrix_loss`; None where sending `rows` (B, L) through the chain is less work.

    passes: how often they would go through it from the data on.
    one: s and t are the same number in every sample, and so are the matrices.
    """
    (B, L), K = rows.shape, transition.codebook_size
    if not _makes_matrices(transition, L * (B if one else 1), passes, rows.device):
        return None
    if one:
        t, s = t[:1], s[:1]
    codes = torch.arange(K, device=rows.device).expand(t.shape[0], K)
    prior = transition.product(codes, None, s)
    step = transition.product(codes, s, t, transpose=True, span=span)
    return prior.expand(B, K, K), step.expand(B, K, K)


def _log_x0(log_p: Tensor, x_t: Tensor, t: Tensor, transition: MatrixTransition, marginal: bool) -> Tensor:
    """log p(x_0), as the rule makes it."""
    return marginal_scores(log_p, transition.product(x_t, None, t, transpose=True)) if marginal else log_p


def _log_model(log_x0: Tensor, s: Tensor, transition: MatrixTransition) -> Tensor:
    return log_prior(log_x0, transition.product(log_x0.exp(), None, s), s)


def posterior(
    logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor, transition: MatrixTransition, marginal: bool, span: int
) -> Tensor:
    """(B, L, K) float64: log p(x_s | x_t)."""
    _check_rule(marginal, transition)
    log_x0 = _log_x0(torch.log_softmax(logits.double(), dim=-1), x_t, t, transition, marginal)
    log_f = log(likelihood(x_t, t, s, transition, span))
    return torch.log_softmax(log_f + _log_model(log_x0, s, transition), dim=-1)


class _Loss(Function):
    """Loss per token times `scale`; its gradient is written in the same pass."""

    @staticmethod
    def forward(logits, x0, x_t, s, prior, step, scale, marginal, aux_weight, with_grad):
        loss, grad = _matrix_loss(logits, x0, x_t, s, prior, step, scale, marginal, aux_weight, with_grad)
        return loss * scale.to(loss.dtype), grad

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1], *kept_for_transforms(inputs[0]))
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else there would be zeros for the second output, as large as the logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * 10
        return scaled_rows(ctx.saved_tensors[0].clone(), grad_loss), *([None] * 9)


def token_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    transition: MatrixTransition,
    scale: Tensor,
    marginal: bool,
    aux_weight: float,
    span: int,
    one: bool,
) -> Tensor:
    """(B, L): (KL(q(x_s | x_t, x_0) || p(x_s | x_t)) - aux_weight log p(x_0)) scale; tokens of scale 0 are not read."""
    _check_rule(marginal, transition)
    # Asked here: inside the function the gradient mode is off, and needs_input_grad does not know of no_grad.
    with_grad = wants_gradient(logits)
    passes = 2 + with_grad + marginal  # of the prediction, of x_0, of the gradient; what the marginal rule divides by
    matrices = _matrices(t, s, x0, transition, passes, span, one)
    if matrices is not None:
        return _Loss.apply(logits, x0, x_t, s, *matrices, scale, marginal, aux_weight, with_grad)[0]
    counts = scale != 0
    log_p = torch.log_softmax(logits.where(counts[..., None], 0).double(), dim=-1)
    log_model = _log_model(_log_x0(log_p, x_t, t, transition, marginal), s, transition)
    log_f = log(likelihood(x_t, t, s, transition, span))
    loss = divergence(log_f, log(transition.product(x0, None, s)), log_model)
    if aux_weight:
        loss = loss - aux_weight * log_p.gather(-1, x0[..., None])[..., 0]
    return (loss.where(counts, 0) * scale).to(torch.promote_types(logits.dtype, torch.float32))


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
    one: bool,
) -> Tensor:
    """(B, L) int64: x_s by inversion of the whole posterior; one random number a token, whichever code it takes."""
    _check_rule(marginal, transition)
    scores = temperature, guidance, top_k, top_p
    passes = 1 + (known is not None) + marginal
    matrices = _matrices(t, s, x_t, transition, passes, span, one)
    if matrices is not None:
        return _matrix_sample(logits, unconditional, x_t, s, *matrices, known, marginal, *scores, key)
    log_x0 = _log_x0(prediction(logits, unconditional, *scores), x_t, t, transition, marginal)
    log_f = log(likelihood(x_t, t, s, transition, span))
    x_s = choose(log_f + _log_model(log_x0, s, transition), x_t, key)
    if known is not None:
        given = draw(transition.product(known.clamp(min=0), None, s), quantiles(key, x_t))
        x_s = torch.where(known >= 0, given, x_s)
    return x_s


def prior_kl(transition: MatrixTransition) -> Tensor:
    """(K,) float64: KL(q(x_T | x_0 = k) || prior)."""
    q, prior = transition.last_rows(), transition.prior()
    return torch.special.xlogy(q, q / prior.where(prior > 0, 1.0)).sum(1)
