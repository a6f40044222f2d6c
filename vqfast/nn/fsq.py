"""Finite scalar quantisation: each channel rounded to a few levels, their product is the codebook."""

import math

import torch
from torch import Tensor

from vqfast.nn.constants import register_constant
from vqfast.nn.lookup_free import LookupFreeQuantizer

_MARGIN = 1e-3  # the outermost levels are reached a little before tanh saturates


class FSQ(LookupFreeQuantizer):
    """Bounds every channel and rounds it to one of its levels (Mentzer et al. 2023); no codebook, no loss.

    Channel i with L levels: with h = (L - 1)(1 + 0.001) / 2 and o = 1/2 for even L, 0 for odd,
    code = round(h tanh(z + artanh(o / h)) - o) / floor(L / 2), within [-1, 1]. With `preserve_symmetry`
    (Parker et al. 2024, section 3.2) code = 2 floor((L - 1)(tanh z + 1) / 2 + 1/2) / (L - 1) - 1: levels
    symmetric about 0 for even L too. The rounding passes gradients straight through.

    A code's index counts with the first channel as the lowest digit, in integers: exact for any codebook
    size below 2^63. Quantisation runs in float32 (float64 for float64 input), also under autocast.

    Args:
        levels: levels of each channel, at least 3; 2 with preserve_symmetry.
        dim: channels of the input; None for len(levels) * num_codebooks. Others are projected linearly.
        num_codebooks: codes a vector.
        keep_num_codebooks_dim: indices (..., num_codebooks) rather than (...); None for several codebooks.
        channel_first: input (B, dim, ...). Input of four or more dimensions always is.
        projection_has_bias: of the projections.
        return_indices: False returns None for the indices.
        preserve_symmetry: see above.

    Raises:
        TypeError: levels that are no whole numbers.
        ValueError: a size out of range.
    """

    def __init__(
        self,
        levels: list[int] | tuple[int, ...],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        *,
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        preserve_symmetry: bool = False,
    ):
        fewest = 2 if preserve_symmetry else 3
        if not all(isinstance(count, int) for count in levels):
            raise TypeError(f"levels: expected whole numbers, got {list(levels)}")
        if not levels or min(levels) < fewest:
            raise ValueError(
                f"levels: expected one or more numbers of at least {fewest} (2 needs preserve_symmetry=True), "
                f"got {list(levels)}"
            )
        codebook_size = math.prod(levels)
        if codebook_size >= 2**63:
            raise ValueError(f"levels: expected a product below 2^63, got {list(levels)}")
        super().__init__(
            dim,
            len(levels),
            num_codebooks,
            keep_num_codebooks_dim,
            True if channel_first else None,
            None,
            projection_has_bias,
        )
        self.levels, self.codebook_size = tuple(levels), codebook_size
        self.return_indices, self.preserve_symmetry = return_indices, preserve_symmetry
        places = [math.prod(levels[:i]) for i in range(len(levels))]
        # Whole numbers only: a cast of the module to half precision must not move the levels.
        register_constant(self, "_levels", self.levels)
        register_constant(self, "_place", places)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantise.

        Args:
            x: (B, ..., dim) float, or (B, dim, ...) where channel-first.

        Returns:
            quantized: shape and dtype of x.
            indices: (B, ...) int64, or (B, ..., num_codebooks).

        Raises:
            TypeError: not a float tensor.
            ValueError: a shape that does not fit.
        """
        z = self._split(x)
        scaled = self._scaled(z)
        level = torch.floor(scaled) if self.preserve_symmetry else torch.round(scaled)
        # Adding 0 with the gradient of the unrounded value: the level stays a whole number.
        codes = self._normalised(level.detach() + (scaled - scaled.detach()))
        indices = None
        if self.return_indices:
            digits = level.to(torch.int64) + (0 if self.preserve_symmetry else self._levels // 2)
            indices = self._shown((digits * self._place).sum(-1))
        return self._merge(codes, x.dtype), indices

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Codes as they stand before project_out, (..., len(levels)), to their indices (...) int64."""
        if codes.shape[-1:] != (self.codebook_dim,):
            raise ValueError(f"codes: expected shape (..., {self.codebook_dim}), got {tuple(codes.shape)}")
        codes = codes.double()
        if self.preserve_symmetry:
            digits = (codes + 1) * (self._levels - 1) / 2
        else:
            digits = (codes + 1) * (self._levels // 2)
        return (digits.round().to(torch.int64) * self._place).sum(-1)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """Indices (...) to the level of each channel, 0 first: (..., len(levels)) int64."""
        return indices.unsqueeze(-1) // self._place % self._levels

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Inverse of forward's indices: its quantized, in the layout of the input, float32."""
        return self._merge(self._codes(self._taken(indices)))

    @property
    def implicit_codebook(self) -> Tensor:
        """Every code in order of its index: (codebook_size, len(levels)) float32, computed at each call."""
        return self._codes(torch.arange(self.codebook_size, device=self._levels.device))

    def _codes(self, indices: Tensor) -> Tensor:
        digits = self.indices_to_level_indices(indices)
        return self._normalised((digits if self.preserve_symmetry else digits - self._levels // 2).float())

    def _scaled(self, z: Tensor) -> Tensor:
        """Channels where levels stand at whole numbers."""
        levels = self._levels.to(z.dtype)
        if self.preserve_symmetry:
            return (levels - 1) * (torch.tanh(z) + 1) / 2 + 0.5
        half = (levels - 1) * (1 + _MARGIN) / 2
        offset = (levels + 1) % 2 / 2
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def _normalised(self, level: Tensor) -> Tensor:
        """Levels at whole numbers to codes in [-1, 1]."""
        return level * 2 / (self._levels - 1) - 1 if self.preserve_symmetry else level / (self._levels // 2)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, dim={self.dim}, num_codebooks={self.num_codebooks}"
