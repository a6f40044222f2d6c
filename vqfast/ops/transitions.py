"""Transition families of discrete diffusion: what the forward chain does to a token."""

import torch
from torch import Tensor


class Uniform:
    """Multinomial diffusion: a token stays, or is replaced by one of the K codes drawn uniformly.

    q(x_t | x_0) = alpha_bar_t [x_t = x_0] + (1 - alpha_bar_t) / K (Hoogeboom et al. 2021, eq. 12; VQ-DDM, section 3).

    Args:
        codebook_size: K >= 1.
        alpha_bar: (T + 1,) probabilities that a token is untouched at noise level 0..T: alpha_bar[0] = 1, never
            rising, positive but for the last. Kept in float64. See vqfast.diffusion.schedules.

    Raises:
        TypeError: alpha_bar is not a floating-point tensor.
        ValueError: K or the table is not as described.
    """

    def __init__(self, codebook_size: int, alpha_bar: Tensor):
        if codebook_size < 1:
            raise ValueError(f"codebook_size: expected at least 1, got {codebook_size}")
        if not isinstance(alpha_bar, Tensor) or not alpha_bar.is_floating_point():
            raise TypeError(f"alpha_bar: expected a floating-point tensor (T + 1,), got {type(alpha_bar).__name__}")
        if alpha_bar.ndim != 1 or alpha_bar.numel() < 2:
            raise ValueError(f"alpha_bar: expected shape (T + 1,) with T >= 1, got {tuple(alpha_bar.shape)}")
        table = alpha_bar.detach().double().cpu()
        if table[0] != 1 or not (table[1:] <= table[:-1]).all() or not (table[:-1] > 0).all() or table[-1] < 0:
            raise ValueError(
                "alpha_bar: expected 1 at level 0, then values that never rise and stay above 0 (the last may be 0), "
                f"got {table[:3].tolist()}..{table[-3:].tolist()}"
            )
        self.codebook_size = codebook_size
        self.T = table.numel() - 1
        self._tables = {alpha_bar.device: alpha_bar.detach().double().contiguous()}

    @property
    def alpha_bar(self) -> Tensor:
        """(T + 1,) float64, on the device that it was given on."""
        return next(iter(self._tables.values()))

    def alpha_bar_on(self, device: torch.device) -> Tensor:
        """The table on `device`, copied there once."""
        table = self._tables.get(device)
        if table is None:
            table = self._tables[device] = self.alpha_bar.to(device)
        return table

    def __repr__(self) -> str:
        return f"Uniform(codebook_size={self.codebook_size}, T={self.T})"
