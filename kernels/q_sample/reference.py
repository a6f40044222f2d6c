"""Definition of the forward process: keep a token, draw another code for it, or mask it."""

import torch
from torch import Tensor

from vqfast.kernels.philox import below, philox, uniform
from vqfast.kernels.posterior.reference import shares


def draw_code(bits: Tensor, codebook_size: int, noise: Tensor | None) -> Tensor:
    """Codes of the distribution that replaces them, from 64 random bits each: the first code whose cumulative
    probability exceeds the uniform number; without `noise` the high word of bits * K.
    """
    if noise is None:
        return below(bits, codebook_size)
    return torch.searchsorted(noise.cumsum(0), uniform(bits), right=True).clamp(max=codebook_size - 1)


def noised(part: Tensor, code: Tensor, x0: Tensor, level: Tensor, levels: Tensor, codebook_size: int) -> Tensor:
    """x at `level` (B,) from x0: kept, `code` or the mask state, as the uniform number `part` (B, L) says."""
    alpha, rho, gamma = (v[:, None] for v in shares(levels, level))
    masked = (gamma > 0) & (part >= alpha + rho)
    return torch.where(part < alpha, x0, torch.where(masked, codebook_size, code))


def q_sample(x0: Tensor, t: Tensor, levels: Tensor, noise: Tensor | None, codebook_size: int, key: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0) = alpha_bar_t [x_t = x_0] + (1 - alpha_bar_t - gamma_bar_t) m(x_t) + gamma_bar_t [x_t = K].

    Hoogeboom et al. 2021 (Multinomial Diffusion), eq. 12; D3PM (Austin et al. 2021), section 3.1; VQ-Diffusion (Gu et
    al. 2022), eq. 8.

    Args:
        x0: (B, L) int64 codes in [0, K).
        t: (B,) int64 noise levels in [0, T]; 0 is data.
        levels: (T + 1, 1) float64 alpha_bar, or (T + 1, 2) alpha_bar and gamma_bar of a family with a mask state.
        noise: (K,) float64 distribution m; None for 1 / K each.
        codebook_size: K.
        key: (2,) int64 Philox key. Row b * L + l uses draw 0: its first integer decides whether the token stays, is
            replaced or is masked, in this order; its second which code replaces it.

    Returns:
        (B, L) int64.
    """
    rows = torch.arange(x0.numel(), device=x0.device).reshape(x0.shape)
    part, code = philox(key, rows, 0)
    return noised(uniform(part), draw_code(code, codebook_size, noise), x0, t, levels, codebook_size)
