"""Definition of the diffusion loss: KL between the true and the predicted posterior of x_s, per token."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vqfast.kernels.posterior.reference import code_posterior, posterior, shifted, step_of


def diffusion_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    levels: Tensor,
    noise: Tensor | None,
    marginal: bool,
    aux_weight: float,
) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) + aux_weight * (-log p(x_0)), in nats, for each token.

    At s = 0 the true posterior is x_0 itself and the KL is the negative log-likelihood of the last step.
    Hoogeboom et al. 2021 (Multinomial Diffusion), eqs. 13-15; D3PM (Austin et al. 2021), eq. 5 for the auxiliary term.

    Args:
        logits: (B, L, K) scores of x_0.
        x0: (B, L) int64 codes in [0, K). x_t: (B, L) int64 codes, or K for the mask state.
        t, s: (B,) int64 noise levels, 0 <= s < t <= T.
        levels, noise, marginal: as for the posterior.
        aux_weight: weight of the cross-entropy of x_0.

    Returns:
        (B, L), dtype of logits.
    """
    true_logits = one_hot(x0, logits.shape[-1]).to(logits.dtype).log()
    log_true = posterior(true_logits, x_t, t, s, levels, noise, False)
    log_model = posterior(logits, x_t, t, s, levels, noise, marginal)
    true = log_true.exp()
    # 0 log 0 = 0: both logarithms are replaced before the product, so that no gradient meets 0 * inf either.
    possible = true > 0
    kl = (true * (log_true.where(possible, 0) - log_model.where(possible, 0))).sum(-1)
    # Left out at weight 0, where an impossible x_0 would make it 0 * inf.
    if not aux_weight:
        return kl
    return kl - aux_weight * torch.log_softmax(logits, dim=-1).gather(-1, x0[..., None])[..., 0]


def diffusion_loss_grad(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    levels: Tensor,
    noise: Tensor | None,
    marginal: bool,
    aux_weight: float,
) -> Tensor:
    """Gradient of each token's loss to its own logits, in closed form.

    With q the true posterior over codes, i = x_t and the names of `Step`, w_k = q_k signal p_k / (signal p_k +
    noise_k) and c = stay signal p_i / Z:
    dL/dlogit_k = flip (p_k (sum_j w_j - c) - w_k + [k = i] c) + aux_weight (p_k - [k = x_0]).
    By the marginal rule p is that of the shifted logits in the first part and that of the logits in the second.

    Returns:
        (B, L, K), dtype of logits.
    """
    K = logits.shape[-1]
    step = step_of(x_t, t, s, levels, noise, K)
    is_x0 = one_hot(x0, K)
    true = code_posterior(is_x0.to(logits.dtype).log(), step).exp()
    p = torch.softmax(shifted(logits, step) if marginal else logits, dim=-1)
    p_i, noise_i = p.gather(-1, step.code), step.noise.expand_as(p).gather(-1, step.code)
    # Without noise the share of the signal is 1, even where p_k has underflowed to 0.
    w = true * torch.where(step.noise > 0, step.signal * p / (step.signal * p + step.noise), 1)
    c = step.stay * step.signal * p_i / (step.move + step.stay * (step.signal * p_i + noise_i))
    grad = step.flip * (p * (w.sum(-1, keepdim=True) - c) - w).scatter_add(-1, step.code, c)
    grad = grad.where(~step.certain, 0)
    return grad + aux_weight * (torch.softmax(logits, dim=-1) - is_x0) if aux_weight else grad
