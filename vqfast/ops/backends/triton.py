"""Triton kernels, on CUDA tensors; with TRITON_INTERPRET=1 on CPU tensors, in Triton's interpreter.

Triton is imported when a kernel is first called, never by importing vqfast.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vqfast.ops.backends.layout import as_rows

NAME = "triton"
PRIORITY = 20
DEVICES = ("cuda", "cpu")


def unavailable(device_type: str) -> str | None:
    spec = find_spec("triton")
    # A folder that happens to be called triton has no origin.
    if spec is None or spec.origin is None:
        return "triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it takes CPU tensors only in the interpreter (TRITON_INTERPRET=1)"
    return None


def unsupported(op: str, args: tuple) -> str | None:
    return None if op in KERNELS else f"it has no kernel for {op}"


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, whichever holds the tensors."""

    @wraps(kernel)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return kernel(first, *rest)

    return run


def _batches(x: Tensor) -> Tensor:
    """(..., D) as (batch, rows, D), in place where `as_rows` can."""
    tensor, (_, batch, rows, *strides) = as_rows(x)
    return tensor.as_strided((batch, rows, x.shape[-1]), strides)


def _nearest(x: Tensor, codebook: Tensor) -> Tensor:
    from vqfast.kernels.nearest.triton import nearest

    return nearest(_batches(x), codebook).view(x.shape[:-1])


def _lookup(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from vqfast.kernels.lookup.triton import lookup

    quantized, error, counts = lookup(_batches(x), codebook, indices.reshape(-1))
    return quantized.view(x.shape), error.view(indices.shape), counts


def _lookup_backward(
    grad_quantized: Tensor, grad_error: Tensor, x: Tensor, codebook: Tensor, indices: Tensor
) -> Tensor:
    from vqfast.kernels.lookup.triton import lookup_backward

    grad = lookup_backward(_batches(grad_quantized), grad_error.reshape(-1), _batches(x), codebook, indices.reshape(-1))
    return grad.view(x.shape)


def _codebook_stats(x: Tensor, indices: Tensor, weights: Tensor | None, codebook_size: int) -> tuple[Tensor, Tensor]:
    from vqfast.kernels.codebook_stats.triton import codebook_stats

    weights = None if weights is None else weights.reshape(-1)
    return codebook_stats(_batches(x), indices.reshape(-1), weights, codebook_size)


def _q_sample(x0: Tensor, *rest: Any) -> Tensor:
    from vqfast.kernels.q_sample.triton import q_sample

    return q_sample(x0, *rest)


def _diffusion_loss(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from vqfast.kernels.diffusion_loss.triton import diffusion_loss

    return diffusion_loss(logits, *rest)


def _scale_rows_(rows: Tensor, scale: Tensor) -> None:
    from vqfast.kernels.diffusion_loss.triton import scale_rows_

    scale_rows_(rows, scale)


def _p_sample(logits: Tensor, *rest: Any) -> Tensor:
    from vqfast.kernels.p_sample.triton import p_sample

    return p_sample(logits, *rest)


KERNELS = {
    "nearest": _on_its_device(_nearest),
    "lookup": _on_its_device(_lookup),
    "lookup_backward": _on_its_device(_lookup_backward),
    "codebook_stats": _on_its_device(_codebook_stats),
    "q_sample": _on_its_device(_q_sample),
    "diffusion_loss": _on_its_device(_diffusion_loss),
    "scale_rows_": _on_its_device(_scale_rows_),
    "p_sample": _on_its_device(_p_sample),
}
