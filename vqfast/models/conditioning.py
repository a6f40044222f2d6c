"""What models are told beside the codes: a grid of noisy ones, a noise level, a class."""

import math
from collections.abc import Mapping

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


def flat_codes(name: str, codes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Codes (B, H, W) or (B, L) of the grid, as (B, L).

    Raises:
        TypeError, ValueError: other than these, naming the argument `name`.
    """
    h, w = grid
    if not isinstance(codes, Tensor) or codes.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 codes (B, {h}, {w}) or (B, {h * w}), got {describe(codes)}")
    if codes.shape[1:] not in ((h, w), (h * w,)):
        raise ValueError(f"{name}: expected codes (B, {h}, {w}) or (B, {h * w}), got {describe(codes)}")
    return codes.flatten(1)


def known_codes(codes: Tensor, mask: Tensor, grid: tuple[int, int], codebook_size: int) -> Tensor:
    """What inpainting is given: codes (B, L) of the grid, -1 where `mask` is true, on the device of `codes`.

    Args:
        codes: (B, H, W) or (B, L) int64; under the mask any value.
        mask: bool, of the shape of `codes`, or (H, W) or (L,) for all of them: true where to draw.

    Raises:
        TypeError, ValueError: codes that are not on the grid or out of range; a mask that is not bool or does not fit.
    """
    flat = flat_codes("codes", codes, grid)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, true where to draw, got {describe(mask)}")
    if mask.shape not in (codes.shape, codes.shape[1:]):
        raise ValueError(
            f"mask: expected shape {tuple(codes.shape)} as codes has, or {tuple(codes.shape[1:])}, got {describe(mask)}"
        )
    mask, K = mask.to(codes.device), codebook_size
    given = codes[~mask.expand_as(codes)]
    if given.numel() and not 0 <= given.min() <= given.max() < K:
        raise ValueError(f"codes: expected values in 0..{K - 1} outside the mask, got {given.min()}..{given.max()}")
    return torch.where(mask, -1, codes).reshape(flat.shape)


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


def check_labels(labels: Tensor, batch: int, num_classes: int | None, *, or_none: bool = True) -> None:
    """Raise unless `labels` are (batch,) int64 in 0..num_classes-1, or -1 with `or_none`; values on the CPU only."""
    if num_classes is None:
        raise ValueError(f"labels: expected None, this model has no classes, got {describe(labels)}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels: expected an int64 tensor of shape (B,), got {describe(labels)}")
    if labels.shape != (batch,):
        raise ValueError(f"labels: expected shape (B,) = ({batch},), got {describe(labels)}")
    # Reading values of another device's tensor would wait for it; a traced graph must not branch on them.
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in labels.aminmax())
        if low < (NO_CLASS if or_none else 0) or high >= num_classes:
            none = f", or {NO_CLASS} for no class" if or_none else " (the model knows no sample without a class)"
            raise ValueError(f"labels: expected values in 0..{num_classes - 1}{none}, got {low}..{high}")


def batch_labels(batch: Mapping[str, Tensor], num_classes: int | None, *, or_none: bool = True) -> Tensor | None:
    """Labels of a training batch, checked; None for a model without classes, which has no use for them.

    Args:
        or_none: whether -1, for no class, may be among them.

    Raises:
        TypeError, ValueError: labels that the model needs are missing, or other than (B,) int64 in range.
    """
    if num_classes is None:
        return None
    labels = batch.get("label")
    if labels is None:
        raise ValueError(f'batch["label"]: missing, but the model has {num_classes} classes; expected (B,) int64')
    check_labels(labels, len(batch["codes"]), num_classes, or_none=or_none)
    return labels


def drop_labels(labels: Tensor, share: float) -> Tensor:
    """Labels (B,), each with this probability replaced by that of no class (classifier-free guidance)."""
    return labels.masked_fill(torch.rand(labels.shape, device=labels.device) < share, NO_CLASS)


def sampling_labels(
    labels: Tensor | int | None, n: int, num_classes: int | None, class_dropout: float, device: torch.device
) -> Tensor | None:
    """(n,) int64 on the device of labels (n,), or of one class for all; None draws without a class.

    Raises:
        TypeError, ValueError: labels missing, not wanted or out of range.
    """
    if labels is None:
        if num_classes is not None and class_dropout == 0:
            raise ValueError(
                f"labels: missing; the model has {num_classes} classes and class_dropout = 0, so it never "
                "learnt to do without one"
            )
        return None
    if isinstance(labels, int):
        labels = torch.full((n,), labels, device="cpu")  # where values can be looked at
    check_labels(labels, n, num_classes, or_none=class_dropout > 0)
    return labels.to(device)


def check_guidance(scale: float, labels: Tensor | None, num_classes: int | None, class_dropout: float) -> None:
    """Raise ValueError where guidance is asked of a model that cannot tell a class from none, or to no class."""
    if scale == 1.0:
        return
    if num_classes is None or class_dropout == 0:
        raise ValueError(
            f"guidance_scale: expected 1 for a model trained without classes or without class_dropout, got {scale}"
        )
    if labels is None:
        raise ValueError(f"labels: guidance_scale = {scale} needs labels, got None")


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
        if self.training and self.dropout > 0:
            labels = drop_labels(labels, self.dropout)
        return self.embedding(torch.where(labels < 0, self.num_classes, labels))
