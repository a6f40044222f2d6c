"""Definition of the uniform forward process: keep a token with probability alpha_bar[t], else draw any of the K."""

import torch
from torch import Tensor

from vqfast.kernels.philox import below, philox, uniform


def uniform_q_sample(x0: Tensor, t: Tensor, alpha_bar: Tensor, codebook_size: int, key: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0) = alpha_bar_t [x_t = x_0] + (1 - alpha_bar_t) / K.

    Hoogeboom et al. 2021 (Multinomial Diffusion), eq. 12; VQ-DDM (arXiv 2112.01799), section 3.

    Args:
        x0: (B, L) int64 codes in [0, K).
        t: (B,) int64 noise levels in [0, T]; 0 is data.
        alpha_bar: (T + 1,) float64, alpha_bar[0] = 1.
        codebook_size: K.
        key: (2,) int64 Philox key. Row b * L + l uses draw 0: its first integer decides whether the token stays, its
            second which code replaces it.

    Returns:
        (B, L) int64.
    """
    rows = torch.arange(x0.numel(), device=x0.device).reshape(x0.shape)
    stay, code = philox(key, rows, 0)
    return torch.where(uniform(stay) < alpha_bar[t][:, None], x0, below(code, codebook_size))
