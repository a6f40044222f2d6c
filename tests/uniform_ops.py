"""The ops on uniform noise by the joint rule, in the arguments that tests of kernels made for it vary."""

import torch
from torch import Tensor

from vqfast.kernels.diffusion_loss import reference as loss_reference
from vqfast.kernels.diffusion_loss.spec import noised
from vqfast.kernels.p_sample import reference as p_sample_reference
from vqfast.kernels.spec import Shape


def uniform_noised(shape: Shape, device: torch.device | str, seed: int) -> tuple:
    """x0, x_t, t, s, alpha_bar."""
    x0, x_t, t, s, levels, _ = noised(shape, device, seed)
    return x0, x_t, t, s, levels[:, 0]


def loss_arguments(
    logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, alpha_bar: Tensor, scale: Tensor,
    aux_weight: float, with_grad: bool,
) -> tuple:  # fmt: skip
    """Of the op diffusion_loss; scale: (B,)."""
    scale = scale[:, None].expand(x0.shape)
    return logits, x0, x_t, t, s, alpha_bar[:, None], None, scale, False, aux_weight, with_grad


def sample_arguments(
    logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor, alpha_bar: Tensor, known: Tensor | None, temperature: float,
    key: Tensor,
) -> tuple:  # fmt: skip
    """Of the op p_sample."""
    return logits, None, x_t, t, s, alpha_bar[:, None], None, known, False, temperature, 1.0, 0, 1.0, key


def uniform_diffusion_loss(*args) -> tuple[Tensor, Tensor]:
    return torch.ops.vqfast.diffusion_loss(*loss_arguments(*args))


def uniform_p_sample(*args) -> Tensor:
    return torch.ops.vqfast.p_sample(*sample_arguments(*args))


def reference_loss(logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, alpha_bar: Tensor, aux_weight: float):
    return loss_reference.diffusion_loss(logits, x0, x_t, t, s, alpha_bar[:, None], None, False, aux_weight)


def reference_grad(logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, alpha_bar: Tensor, aux_weight: float):
    return loss_reference.diffusion_loss_grad(logits, x0, x_t, t, s, alpha_bar[:, None], None, False, aux_weight)


def reference_p_sample(*args) -> Tensor:
    return p_sample_reference.p_sample(*sample_arguments(*args))
