"""Definition of the uniform reverse step: one draw of x_s from the plug-in posterior of the predicted x_0."""

import torch
from torch import Tensor

from vqfast.kernels.philox import below, philox, uniform


def uniform_p_sample(
    logits: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    alpha_bar: Tensor,
    known: Tensor | None,
    temperature: float,
    key: Tensor,
) -> Tensor:
    """x_s ~ p(x_s | x_t), proportional to f_j (alpha_bar_s p_j + (1 - alpha_bar_s) / K).

    p = softmax(logits / temperature) is the predicted x_0; f_j = a [j = x_t] + (1 - a) / K is the likelihood of x_t
    given x_s = j, a = alpha_bar_t / alpha_bar_s. The sum splits into three parts that can be drawn without building
    it: x_s = x_t (weight a (alpha_bar_s p_{x_t} + (1 - alpha_bar_s) / K)), any code (weight (1 - a)(1 - alpha_bar_s)
    / K), a code of p (weight (1 - a) alpha_bar_s / K). Hoogeboom et al. 2021, eq. 14; steps to any s < t by the
    composition of the chain.

    Args:
        logits: (B, L, K) scores of x_0.
        x_t: (B, L) int64 codes.
        t, s: (B,) int64 noise levels, 0 <= s < t <= T.
        alpha_bar: (T + 1,) float64.
        known: (B, L) int64 clean codes that are given, -1 elsewhere; a given position is drawn from q(x_s | known).
        temperature: divides the logits, > 0.
        key: (2,) int64 Philox key. Row b * L + l: draw 0 gives the integers that choose the part (first) and the code
            of a uniform part (second); draw 1's first integer chooses within p, in the order of the codes: the first
            code whose cumulative probability exceeds it.

    Returns:
        (B, L) int64. A row whose logits are NaN throughout keeps x_t.
    """
    K = logits.shape[-1]
    rows = torch.arange(x_t.numel(), device=x_t.device).reshape(x_t.shape)
    part, any_code = philox(key, rows, 0)
    within, _ = philox(key, rows, 1)
    part, any_code, within = uniform(part), below(any_code, K), uniform(within)

    alpha_s = alpha_bar[s][:, None]
    a = alpha_bar[t][:, None] / alpha_s
    scores = logits.double() / temperature
    weight = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weight.sum(-1)
    p_stay = weight.gather(-1, x_t[..., None])[..., 0] / total

    stay = a * (alpha_s * p_stay + (1 - alpha_s) / K)
    replace = (1 - a) * (1 - alpha_s) / K
    predict = (1 - a) * alpha_s / K
    target = part * (stay + replace + predict)

    cumulative = weight.cumsum(-1)
    drawn = (cumulative <= (within * total)[..., None]).sum(-1)
    # Rounding can leave the target at the very end: then the last code that has any weight.
    last = K - 1 - (weight > 0).flip(-1).to(torch.uint8).argmax(-1)
    drawn = torch.minimum(drawn, last)

    x_s = torch.where(target < stay, x_t, torch.where(target < stay + replace, any_code, drawn))
    x_s = torch.where(total.isfinite() & (total > 0), x_s, x_t)
    if known is not None:
        renoised = torch.where(part < alpha_s, known, any_code)
        x_s = torch.where(known >= 0, renoised, x_s)
    return x_s
