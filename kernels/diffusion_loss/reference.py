"""Definition of the uniform diffusion loss: KL between the true and the predicted posterior of x_s, per token."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def uniform_posterior(log_p: Tensor, x_t: Tensor, t: Tensor, s: Tensor, alpha_bar: Tensor) -> Tensor:
    """log p(x_s | x_t), the normalised product f_j (alpha_bar_s p_j + (1 - alpha_bar_s) / K).

    f_j = a [j = x_t] + (1 - a) / K is the likelihood of x_t given x_s = j, with a = alpha_bar_t / alpha_bar_s.

    Args:
        log_p: (B, L, K) log-probabilities of x_0 (a log one-hot gives the true posterior).
        x_t: (B, L) int64. t, s: (B,) int64, 0 <= s < t <= T. alpha_bar: (T + 1,) float64.

    Returns:
        (B, L, K) log-probabilities, dtype of log_p.
    """
    K = log_p.shape[-1]
    alpha_s = alpha_bar[s].to(log_p.dtype)[:, None, None]
    a = (alpha_bar[t] / alpha_bar[s]).to(log_p.dtype)[:, None, None]
    likelihood = torch.log(a * one_hot(x_t, K) + (1 - a) / K)
    prior = torch.logaddexp(alpha_s.log() + log_p, torch.log((1 - alpha_s) / K))
    return torch.log_softmax(likelihood + prior, dim=-1)


def uniform_diffusion_loss(
    logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, alpha_bar: Tensor, aux_weight: float
) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) + aux_weight * (-log p(x_0)), in nats, for each token.

    At s = 0 the true posterior is x_0 itself and the KL is the negative log-likelihood of the last step.
    Hoogeboom et al. 2021 (Multinomial Diffusion), eqs. 13-15; D3PM (Austin et al. 2021), eq. 5 for the auxiliary term.

    Args:
        logits: (B, L, K) scores of x_0.
        x0, x_t: (B, L) int64 codes in [0, K).
        t, s: (B,) int64 noise levels, 0 <= s < t <= T.
        alpha_bar: (T + 1,) float64, alpha_bar[0] = 1.
        aux_weight: weight of the cross-entropy of x_0.

    Returns:
        (B, L), dtype of logits.
    """
    K = logits.shape[-1]
    log_p = torch.log_softmax(logits, dim=-1)
    log_true = uniform_posterior(one_hot(x0, K).to(logits.dtype).log(), x_t, t, s, alpha_bar)
    log_model = uniform_posterior(log_p, x_t, t, s, alpha_bar)
    true = log_true.exp()
    # 0 log 0 = 0: both logarithms are replaced before the product, so that no gradient meets 0 * inf either.
    possible = true > 0
    kl = (true * (log_true.where(possible, 0) - log_model.where(possible, 0))).sum(-1)
    # Left out at weight 0, where an impossible x_0 would make it 0 * inf.
    return kl - aux_weight * log_p.gather(-1, x0[..., None])[..., 0] if aux_weight else kl


def uniform_diffusion_loss_grad(
    logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, alpha_bar: Tensor, aux_weight: float
) -> Tensor:
    """Gradient of each token's loss to its own logits, in closed form.

    With q the true posterior, i = x_t, Z = sum_j f_j (alpha_bar_s p_j + (1 - alpha_bar_s) / K) and
    r_k = q_k alpha_bar_s p_k / (alpha_bar_s p_k + (1 - alpha_bar_s) / K):
    dL/dlogit_k = p_k (sum_j r_j - c) - r_k + [k = i] c + aux_weight (p_k - [k = x_0]), c = a alpha_bar_s p_i / Z.

    Returns:
        (B, L, K), dtype of logits.
    """
    K = logits.shape[-1]
    alpha_s = alpha_bar[s].to(logits.dtype)[:, None, None]
    a = (alpha_bar[t] / alpha_bar[s]).to(logits.dtype)[:, None, None]
    noise = (1 - alpha_s) / K
    p = torch.softmax(logits, dim=-1)
    is_x_t, is_x0 = one_hot(x_t, K), one_hot(x0, K)
    true = uniform_posterior(is_x0.to(logits.dtype).log(), x_t, t, s, alpha_bar).exp()
    p_i = p.gather(-1, x_t[..., None])
    normaliser = (1 - a) / K + a * (alpha_s * p_i + noise)
    # At s = 0 there is no noise and the share of the signal is 1, even where p_k has underflowed to 0.
    r = true * torch.where(noise > 0, alpha_s * p / (alpha_s * p + noise), 1)
    c = a * alpha_s * p_i / normaliser
    return p * (r.sum(-1, keepdim=True) - c) - r + is_x_t * c + aux_weight * (p - is_x0)
