"""Definition of the loss of a step of a chain through matrices, in float64, per token, with its gradient."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

# What q(x_t | x_0) is at the least where x_0 can have led to x_t: the products below it leave the range of float64, and
# the marginal rule divides by their sum.
LEAST_EVIDENCE = 1e-290


def rows_of(matrices: Tensor, codes: Tensor) -> Tensor:
    """(B, L, K): row codes[b, l] of matrices[b]. matrices: (B, K, K). codes: (B, L) int64."""
    return matrices.gather(1, codes[..., None].expand(-1, -1, matrices.shape[-1]))


def log(x: Tensor) -> Tensor:
    """log x, -inf at 0, and there without a gradient."""
    possible = x > 0
    return torch.where(possible, x.where(possible, 1.0).log(), -torch.inf)


def marginal(log_p: Tensor, q: Tensor) -> Tensor:
    """log p(x_0) whose joint posterior is the marginal posterior of `log_p`: p_k / q(x_t | x_0 = k), normalised.

    An x_0 that cannot have led to x_t has no posterior of x_s, and no weight. q: (B, L, K), q(x_t | x_0 = k).
    """
    possible = q >= LEAST_EVIDENCE
    return torch.log_softmax(torch.where(possible, log_p - log(q).where(possible, 0), -torch.inf), dim=-1)


def log_prior(log_p: Tensor, product: Tensor, s: Tensor) -> Tensor:
    """log sum_k p_k q(x_s | x_0 = k) of the product; at s = 0 log_p, which may be below what its exponential holds."""
    return torch.where((s == 0)[:, None, None], log_p, log(product))


def divergence(log_f: Tensor, log_true: Tensor, log_model: Tensor) -> Tensor:
    """(B, L): KL of f_j true_j, normalised, from f_j model_j, normalised. All (B, L, K) logarithms.

    The likelihood of x_t, f, is a factor of both posteriors and leaves their ratio but for the normalisers.
    """
    true = torch.softmax(log_f + log_true, dim=-1)
    # 0 log 0 = 0: the difference is replaced before the product, so that no gradient meets 0 * inf either. A pair of
    # x_0 and x_t that the chain cannot give has no posterior: NaN, which is not above 0 but is not 0 either.
    ratio = torch.log_softmax(log_f + log_true, -1) - torch.log_softmax(log_f + log_model, -1)
    return (true * ratio.masked_fill(true == 0, 0)).sum(-1)


def matrix_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    s: Tensor,
    prior: Tensor,
    likelihood: Tensor,
    marginal_rule: bool,
    aux_weight: float,
) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) - aux_weight log p(x_0), in nats, for each token.

    D3PM (Austin et al. 2021), eqs. 4 and 5. With f_j = q(x_t | x_s = j) the posteriors are f_j q(x_s = j | x_0) and
    f_j (p prior)_j, normalised.

    Args:
        logits: (B, L, K) scores of x_0.
        x0, x_t: (B, L) int64 codes in [0, K).
        s: (B,) int64 level that the step goes to. Where it is 0, `prior` is the identity and is not multiplied with.
        prior: (B, K, K) float64, row k is q(x_s | x_0 = k).
        likelihood: (B, K, K) float64, row i is q(x_t = i | x_s = j) for every j: the step transposed.
        marginal_rule: which rule, see kernels/posterior.
        aux_weight: weight of the cross-entropy of x_0.

    Returns:
        (B, L) float64. Gradient to logits.
    """
    log_p = torch.log_softmax(logits.double(), dim=-1)
    f = rows_of(likelihood, x_t)
    log_x0 = marginal(log_p, f @ prior.mT) if marginal_rule else log_p
    log_model = log_prior(log_x0, log_x0.exp() @ prior, s)
    kl = divergence(log(f), log(rows_of(prior, x0)), log_model)
    return kl - aux_weight * log_p.gather(-1, x0[..., None])[..., 0] if aux_weight else kl


def matrix_loss_grad(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    s: Tensor,
    prior: Tensor,
    likelihood: Tensor,
    marginal_rule: bool,
    aux_weight: float,
) -> Tensor:
    """(B, L, K) float64: gradient of each token's loss to its own logits, in closed form.

    With a and b the true and the predicted posterior, m = p prior and p what the rule makes of the prediction,
    dL/dm_j = (b_j - a_j) / m_j and dL/dlogit_k = p_k sum_j prior_kj dL/dm_j: the sum over k of that, which the gradient
    of a softmax takes off, is sum_j (b_j - a_j) = 0. At s = 0 it is b - a.
    """
    K = logits.shape[-1]
    log_p = torch.log_softmax(logits.double(), dim=-1)
    f = rows_of(likelihood, x_t)
    log_x0 = marginal(log_p, f @ prior.mT) if marginal_rule else log_p
    p = log_x0.exp()
    product = p @ prior
    true = torch.softmax(log(f) + log(rows_of(prior, x0)), dim=-1)
    model = torch.softmax(log(f) + log_prior(log_x0, product, s), dim=-1)
    slope = model - true
    per_product = torch.where(product == 0, 0, slope / product)
    grad = torch.where((s == 0)[:, None, None], slope, p * (per_product @ prior.mT))
    return grad + aux_weight * (log_p.exp() - one_hot(x0, K)) if aux_weight else grad
