"""What quantisers without a stored codebook share: projections, layouts, several codes a vector."""

import torch
from torch import Tensor, nn

from vqfast.nn.layout import channels_last
from vqfast.ops.checks import check_float, check_indices


class LookupFreeQuantizer(nn.Module):
    """Base of FSQ and LFQ: a vector becomes `num_codebooks` codes of `codebook_dim` independent numbers.

    Args:
        dim: channels of input and output; None for codebook_dim * num_codebooks.
        codebook_dim: d, numbers of a code.
        num_codebooks: C, codes a vector.
        keep_num_codebooks_dim: indices (..., C) rather than (...); None for C > 1.
        channel_first: input (B, dim, ...); None for input of four or more dimensions only.
        has_projections: linear maps to and from C * d channels; None where dim differs from C * d.
        projection_has_bias: of both maps.

    Raises:
        ValueError: a size below 1, several codebooks without their dimension, or a projection turned off
            where dim needs one.
    """

    def __init__(
        self,
        dim: int | None,
        codebook_dim: int,
        num_codebooks: int,
        keep_num_codebooks_dim: bool | None,
        channel_first: bool | None,
        has_projections: bool | None,
        projection_has_bias: bool,
    ):
        super().__init__()
        width = codebook_dim * num_codebooks
        dim = width if dim is None else dim
        for name, value in (("num_codebooks", num_codebooks), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if num_codebooks > 1 and keep_num_codebooks_dim is False:
            raise ValueError(
                f"keep_num_codebooks_dim: expected True or None with num_codebooks={num_codebooks}, got False"
            )
        if has_projections is False and dim != width:
            raise ValueError(
                f"has_projections: expected True or None with dim={dim} and {width} code channels, got False"
            )
        self.dim, self.codebook_dim, self.num_codebooks = dim, codebook_dim, num_codebooks
        self.keep_num_codebooks_dim = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        self.channel_first = channel_first
        self.has_projections = dim != width if has_projections is None else has_projections
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, width, bias=projection_has_bias)
            self.project_out = nn.Linear(width, dim, bias=projection_has_bias)

    codebook_size: int  # K, which the subclass sets

    def _split(self, x: Tensor) -> Tensor:
        """Input to (B, ..., C, d), in float32 (float64 stays) whatever came or autocast made of it."""
        check_float("x", x)
        z = channels_last(x, self.dim, self._is_channel_first(x.ndim))
        if self.has_projections:
            z = self.project_in(z.to(self.project_in.weight.dtype))
        z = z.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        return z if z.dtype == torch.float64 else z.float()

    def _merge(self, codes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, ..., C, d) to the layout and channels of the input."""
        out = codes.flatten(-2)
        if self.has_projections:
            out = self.project_out(out.to(self.project_out.weight.dtype))
        out = out if dtype is None else out.to(dtype)
        return out.movedim(-1, 1) if self._is_channel_first(out.ndim) else out

    def _is_channel_first(self, ndim: int) -> bool:
        return ndim >= 4 if self.channel_first is None else self.channel_first

    def _shown(self, indices: Tensor) -> Tensor:
        """(B, ..., C) to what the caller sees."""
        return indices if self.keep_num_codebooks_dim else indices.squeeze(-1)

    def _taken(self, indices: Tensor) -> Tensor:
        """What the caller has to (B, ..., C)."""
        check_indices(indices, self.codebook_size)
        if not self.keep_num_codebooks_dim:
            return indices.unsqueeze(-1)
        if indices.ndim < 2 or indices.shape[-1] != self.num_codebooks:
            raise ValueError(f"indices: expected shape (B, ..., {self.num_codebooks}), got {tuple(indices.shape)}")
        return indices
