"""Plain torch on any device: the definition of every op, and the fallback."""

import torch
from torch import Tensor

from vqfast.kernels.codebook_stats.reference import codebook_stats
from vqfast.kernels.diffusion_loss.reference import uniform_diffusion_loss, uniform_diffusion_loss_grad
from vqfast.kernels.grain_entropy.reference import grain_entropy
from vqfast.kernels.lookup.reference import lookup, lookup_backward
from vqfast.kernels.nearest.reference import nearest
from vqfast.kernels.p_sample.reference import uniform_p_sample
from vqfast.kernels.pack.reference import pack
from vqfast.kernels.position_mask.reference import position_mask
from vqfast.kernels.q_sample.reference import uniform_q_sample
from vqfast.kernels.unpack.reference import unpack, unpack_backward

NAME = "reference"
PRIORITY = 0
DEVICES = ("cpu", "cuda")


def unavailable(device_type: str) -> str | None:
    return None


def unsupported(op: str, args: tuple) -> str | None:
    return None


def _uniform_diffusion_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    alpha_bar: Tensor,
    scale: Tensor,
    aux_weight: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    # float64 throughout: near the data the KL is 1e-5 of the terms that it is a difference of.
    wide = logits.double()
    loss = uniform_diffusion_loss(wide, x0, x_t, t, s, alpha_bar, aux_weight)
    loss = loss.to(torch.promote_types(logits.dtype, torch.float32))
    if not with_grad:
        return loss, logits.new_empty(0)
    grad = uniform_diffusion_loss_grad(wide, x0, x_t, t, s, alpha_bar, aux_weight)
    return loss, (grad * scale[:, None, None]).to(logits.dtype)


def _scale_rows_(rows: Tensor, scale: Tensor) -> None:
    rows.mul_(scale[..., None])


KERNELS = {
    "nearest": nearest,
    "lookup": lookup,
    "lookup_backward": lookup_backward,
    "codebook_stats": codebook_stats,
    "uniform_q_sample": uniform_q_sample,
    "uniform_diffusion_loss": _uniform_diffusion_loss,
    "scale_rows_": _scale_rows_,
    "uniform_p_sample": uniform_p_sample,
    "pack": pack,
    "unpack": unpack,
    "unpack_backward": unpack_backward,
    "position_mask": position_mask,
    "grain_entropy": grain_entropy,
}
