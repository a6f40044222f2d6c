"""Plain torch on any device: the definition of every op, and the fallback."""

from typing import Any

import torch
from torch import Tensor

from vqfast.kernels.codebook_stats.reference import codebook_stats
from vqfast.kernels.diffusion_loss.reference import diffusion_loss, diffusion_loss_grad
from vqfast.kernels.dynamic_lookup.reference import dynamic_lookup, dynamic_lookup_backward
from vqfast.kernels.grain_entropy.reference import grain_entropy
from vqfast.kernels.lookup.reference import lookup, lookup_backward
from vqfast.kernels.matrix_loss.reference import matrix_loss, matrix_loss_grad
from vqfast.kernels.matrix_sample.reference import matrix_sample
from vqfast.kernels.nearest.reference import nearest
from vqfast.kernels.p_sample.reference import p_sample
from vqfast.kernels.pack.reference import pack
from vqfast.kernels.position_mask.reference import position_mask
from vqfast.kernels.posterior.reference import posterior, posterior_backward
from vqfast.kernels.q_sample.reference import q_sample
from vqfast.kernels.residual_nearest.reference import residual_nearest
from vqfast.kernels.transition_matmul.library import by_batches
from vqfast.kernels.unpack.reference import unpack, unpack_backward

NAME = "reference"
PRIORITY = 0
DEVICES = ("cpu", "cuda")


def unavailable(device_type: str) -> str | None:
    return None


def unsupported(op: str, args: tuple) -> str | None:
    return None


def _posterior(
    logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor, levels: Tensor, noise: Tensor | None, marginal: bool
) -> Tensor:
    return posterior(logits.double(), x_t, t, s, levels, noise, marginal).to(logits.dtype)


def _posterior_backward(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return posterior_backward(grad, logits.double(), *rest).to(logits.dtype)


def _diffusion_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    levels: Tensor,
    noise: Tensor | None,
    scale: Tensor,
    marginal: bool,
    aux_weight: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    # float64 throughout: near the data the KL is 1e-5 of the terms that it is a difference of.
    args = (logits.double(), x0, x_t, t, s, levels, noise, marginal, aux_weight)
    counts = scale != 0
    loss = diffusion_loss(*args).where(counts, 0).to(torch.promote_types(logits.dtype, torch.float32))
    if not with_grad:
        return loss, logits.new_empty(0)
    grad = diffusion_loss_grad(*args) * scale[..., None]
    return loss, grad.where(counts[..., None], 0).to(logits.dtype)


def _matrix_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    s: Tensor,
    prior: Tensor,
    likelihood: Tensor,
    scale: Tensor,
    marginal: bool,
    aux_weight: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    args = (logits, x0, x_t, s, prior, likelihood, marginal, aux_weight)
    counts = scale != 0
    loss = matrix_loss(*args).where(counts, 0).to(torch.promote_types(logits.dtype, torch.float32))
    if not with_grad:
        return loss, logits.new_empty(0)
    grad = matrix_loss_grad(*args) * scale[..., None]
    return loss, grad.where(counts[..., None], 0).to(logits.dtype)


def _scale_rows_(rows: Tensor, scale: Tensor) -> None:
    rows.mul_(scale[..., None])


def _nearest(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None = None,
    prepared: Tensor | None = None,
    metric: str = "l2",
    exact: bool = True,
) -> Tensor:
    return nearest(x, codebook, mask, metric)


def _nearest_counted(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None = None,
    prepared: Tensor | None = None,
    metric: str = "l2",
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Every row is decided in float64."""
    indices = nearest(x, codebook, mask, metric)
    return indices, (indices >= 0).sum()


def _nearest_prepare(codebook: Tensor, metric: str) -> Tensor:
    """Nothing to prepare: every search reads the codebook as it is."""
    return codebook.new_empty(0, dtype=torch.uint8)


KERNELS = {
    "nearest": _nearest,
    "nearest_counted": _nearest_counted,
    "nearest_prepare": _nearest_prepare,
    "residual_nearest": residual_nearest,
    "lookup": lookup,
    "lookup_backward": lookup_backward,
    "codebook_stats": codebook_stats,
    "q_sample": q_sample,
    "posterior": _posterior,
    "posterior_backward": _posterior_backward,
    "diffusion_loss": _diffusion_loss,
    "scale_rows_": _scale_rows_,
    "p_sample": p_sample,
    "transition_matmul": by_batches,
    "matrix_loss": _matrix_loss,
    "matrix_sample": matrix_sample,
    "pack": pack,
    "unpack": unpack,
    "unpack_backward": unpack_backward,
    "dynamic_lookup": dynamic_lookup,
    "dynamic_lookup_backward": dynamic_lookup_backward,
    "position_mask": position_mask,
    "grain_entropy": grain_entropy,
}
