"""What every denoiser takes in: a grid of noisy codes, a noise level, a class."""

import math

import torch
from torch import Tensor, nn

from vqfast.diffusion.sampler import NO_CLASS
from vqfast.ops.checks import describe


def as_grid(x_t: Tensor, grid: tuple[int, int]) -> Tensor:
    """Codes as (B, H, W): those given as (B, L) are read row by row into `grid`.

    Raises:
        TypeError: not int64.
        ValueError: another number of dimensions, or L other than the cells of `grid`.
    """
    if not isinstance(x_t, Tensor) or x_t.dtype != torch.int64:
        raise TypeError(f"x_t: expected int64 codes, got {describe(x_t)}")
    if x_t.ndim == 3:
        return x_t
    h, w = grid
    if x_t.ndim != 2 or x_t.shape[1] != h * w:
        raise ValueError(f"x_t: expected (B, {h * w}) for the grid {h} x {w}, or (B, H, W), got {describe(x_t)}")
    return x_t.reshape(x_t.shape[0], h, w)


def level_features(t: Tensor, T: int, dim: int) -> Tensor:
    """Sines, then cosines of the noise level, at wavelengths from 2 pi to 20000 pi over a range of 4000.

    VQ-DDM's time features (arXiv 2112.01799, released code). The chain is rescaled to 4000 steps, so that
    features of different T agree; level 1 is at 0.

    Args:
        t: (B,) int64 in 1..T.
        dim: even, at least 4.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    rate = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / (half - 1)))
    angle = ((t - 1).float() / T * 4000.0)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def check_labels(labels: Tensor, batch: int, num_classes: int | None) -> None:
    """Raise unless `labels` are (batch,) int64 in -1..num_classes-1; values are checked on the CPU only."""
    if num_classes is None:
        raise ValueError(f"labels: expected None, this model has no classes, got {describe(labels)}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels: expected an int64 tensor of shape (B,), got {describe(labels)}")
    if labels.shape != (batch,):
        raise ValueError(f"labels: expected shape (B,) = ({batch},), got {describe(labels)}")
    # Reading values of another device's tensor would wait for it; a traced graph must not branch on them.
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in labels.aminmax())
        if low < NO_CLASS or high >= num_classes:
            raise ValueError(
                f"labels: expected values in 0..{num_classes - 1}, or {NO_CLASS} for no class, got {low}..{high}"
            )


class ClassEmbedding(nn.Module):
    """A vector per class, and one for no class (Ho and Salimans 2022, classifier-free guidance).

    Args:
        num_classes: number of classes.
        dim: size of the vectors.
        dropout: share of the labels that training replaces by no class.
    """

    def __init__(self, num_classes: int, dim: int, dropout: float):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, or None, got {num_classes!r}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"class_dropout: expected a share in 0..1, got {dropout!r}")
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor | None, batch: int) -> Tensor:
        """(batch, dim) for labels (batch,) int64, -1 or None for no class."""
        if labels is None:
            labels = torch.full((batch,), NO_CLASS, device=self.embedding.weight.device)
        check_labels(labels, batch, self.num_classes)
        none = labels < 0
        if self.training and self.dropout > 0:
            none = none | (torch.rand(labels.shape, device=labels.device) < self.dropout)
        return self.embedding(torch.where(none, self.num_classes, labels))
