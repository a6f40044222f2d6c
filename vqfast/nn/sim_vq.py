"""A codebook that moves as a whole: frozen random codes behind a learned map."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqfast.nn.layout import channels_last
from vqfast.nn.precision import full_precision
from vqfast.ops import quantize
from vqfast.ops.checks import check_indices


class SimVQ(nn.Module):
    """Nearest code of a codebook that is a learned transform of fixed random vectors (Zhu et al. 2024).

    Every gradient step turns the whole codebook, so that codes nobody chose move along and none dies. The loss
    is commitment_weight * (mean |sg(x) - code|^2 + w mean |x - sg(code)|^2) with w =
    input_to_quantize_commit_loss_weight, in training and eval mode alike; its first term trains the transform.

    Input of another float dtype than the codes is cast to theirs for the search and the loss, and `quantized`
    is cast back. The transform runs outside autocast: codes do not depend on it.

    Args:
        dim: D, size of a vector.
        codebook_size: K, number of codes.
        codebook_transform: module from (K, frozen_codebook_dim) to (K, D); None for a linear map without bias.
        init_fn: applied to the (K, frozen_codebook_dim) Gaussian start, of standard deviation
            frozen_codebook_dim^-1/2, once; None keeps it.
        channel_first: input (B, D, ...) rather than (B, ..., D).
        rotation_trick: turn the gradient of `quantized` as the vector was turned (Fifty et al. 2024); else it
            passes straight through.
        input_to_quantize_commit_loss_weight: w above.
        commitment_weight: of the whole loss.
        frozen_codebook_dim: size of the fixed vectors; None for D.

    Buffers: frozen_codebook (K, frozen_codebook_dim).

    Raises:
        ValueError: a size below 1 or a weight below 0.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] | None = None,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ):
        super().__init__()
        frozen_codebook_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        sizes = {"dim": dim, "codebook_size": codebook_size, "frozen_codebook_dim": frozen_codebook_dim}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        weights = {
            "input_to_quantize_commit_loss_weight": input_to_quantize_commit_loss_weight,
            "commitment_weight": commitment_weight,
        }
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        self.dim, self.codebook_size = dim, codebook_size
        self.channel_first, self.rotation_trick = channel_first, rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight
        if codebook_transform is None:
            codebook_transform = nn.Linear(frozen_codebook_dim, dim, bias=False)
        self.code_transform = codebook_transform
        frozen = torch.randn(codebook_size, frozen_codebook_dim) * frozen_codebook_dim**-0.5
        self.register_buffer("frozen_codebook", frozen if init_fn is None else init_fn(frozen))

    @property
    def codebook(self) -> Tensor:
        """(K, D), computed from the frozen one at each call, with gradients to the transform."""
        with full_precision(self.frozen_codebook):
            return self.code_transform(self.frozen_codebook)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise.

        Args:
            x: (B, ..., D) float, or (B, D, ...) where channel_first.

        Returns:
            quantized: shape and dtype of x.
            indices: (B, ...) int64.
            loss: scalar.

        Raises:
            TypeError: not a float tensor.
            ValueError: a shape that does not fit.
        """
        codebook = self.codebook
        result = quantize(
            channels_last(x, self.dim, self.channel_first).to(codebook.dtype),
            codebook,
            beta=self.input_to_quantize_commit_loss_weight * self.commitment_weight,
            codebook_weight=self.commitment_weight,
            estimator="rotation" if self.rotation_trick else "ste",
        )
        quantized = result.quantized.to(x.dtype)
        return quantized.movedim(-1, 1) if self.channel_first else quantized, result.indices, result.loss

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, ...) int64 to the codes (B, ..., D), or (B, D, ...) where channel_first."""
        check_indices(indices, self.codebook_size)
        codes = nn.functional.embedding(indices, self.codebook)
        return codes.movedim(-1, 1) if self.channel_first else codes

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}"
