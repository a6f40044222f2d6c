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

from vqfast.kernels.residual_nearest.reference import residual_nearest
from vqfast.ops.backends.layout import as_rows

NAME = "triton"
PRIORITY = 20
DEVICES = ("cuda", "cpu")

# Of a step through matrices: tiles of more codes spill registers, and truncated ones of half as many.
_MOST_STEP_CODES = 256


def unavailable(device_type: str) -> str | None:
    spec = find_spec("triton")
    # A folder that happens to be called triton has no origin.
    if spec is None or spec.origin is None:
        return "triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it takes CPU tensors only in the interpreter (TRITON_INTERPRET=1)"
    return None


def unsupported(op: str, args: tuple) -> str | None:
    if op not in KERNELS:
        return f"it has no kernel for {op}"
    if op in ("matrix_loss", "matrix_sample"):
        # Arguments 10 and 11 of matrix_sample are top_k and top_p.
        truncates = op == "matrix_sample" and (args[10] > 0 or args[11] < 1)
        most = _MOST_STEP_CODES // 2 if truncates else _MOST_STEP_CODES
        if args[0].shape[-1] > most:
            return f"K = {args[0].shape[-1]} codes, at most {most} are kept in registers"
    return None


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


def _nearest_counted(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None = None,
    prepared: Tensor | None = None,
    metric: str = "l2",
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    from vqfast.kernels.nearest.triton import nearest

    if codebook.ndim == 3:
        heads = [
            _nearest_counted(x.select(-2, h), codebook[h], None if mask is None else mask[..., h], None, metric, exact)
            for h in range(codebook.shape[0])
        ]
        indices, counts = zip(*heads, strict=True)
        return torch.stack(indices, -1), torch.stack(counts).sum()
    indices, reranked = nearest(_batches(x), codebook, None if mask is None else mask.reshape(-1), metric, exact)
    return indices.view(x.shape[:-1]), reranked


def _nearest(*args: Any) -> Tensor:
    return _nearest_counted(*args)[0]


def _nearest_prepare(codebook: Tensor, metric: str) -> Tensor:
    """Nothing: each search centres the codebook as it goes."""
    return codebook.new_empty(0, dtype=torch.uint8)


def _residual_nearest(x: Tensor, codebooks: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return residual_nearest(x, codebooks, mask, _nearest)


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


def _posterior(logits: Tensor, *rest: Any) -> Tensor:
    from vqfast.kernels.posterior.rows_triton import posterior

    return posterior(logits, *rest)


def _posterior_backward(grad: Tensor, *rest: Any) -> Tensor:
    from vqfast.kernels.posterior.rows_triton import posterior_backward

    return posterior_backward(grad, *rest)


def _diffusion_loss(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from vqfast.kernels.diffusion_loss.triton import diffusion_loss

    return diffusion_loss(logits, *rest)


def _scale_rows_(rows: Tensor, scale: Tensor) -> None:
    from vqfast.kernels.diffusion_loss.triton import scale_rows_

    scale_rows_(rows, scale)


def _p_sample(logits: Tensor, *rest: Any) -> Tensor:
    from vqfast.kernels.p_sample.triton import p_sample

    return p_sample(logits, *rest)


def _matrix_loss(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from vqfast.kernels.matrix_loss.triton import matrix_loss

    return matrix_loss(logits, *rest)


def _matrix_sample(logits: Tensor, *rest: Any) -> Tensor:
    from vqfast.kernels.matrix_sample.triton import matrix_sample

    return matrix_sample(logits, *rest)


def _pack(values: Tensor, grains: Tensor, region: bool, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from vqfast.kernels.pack.triton import pack

    num_grains = (values.shape[1] // grains.shape[1]).bit_length()
    rows = values if values.ndim == 4 else values[..., None]
    packed, *layout = pack(_batches(rows), grains, num_grains, region, capacity)
    return packed.view(capacity, *values.shape[3:]), *layout


def _unpack(values: Tensor, *args: Any) -> Tensor:
    from vqfast.kernels.unpack.triton import unpack

    grains, num_grains = args[3:5]
    grid = unpack(values if values.ndim == 2 else values[:, None], *args)
    (B, Hc, Wc), factor = grains.shape, 2 ** (num_grains - 1)
    return grid.view(B, Hc * factor, Wc * factor, *values.shape[1:])


def _unpack_backward(grad: Tensor, *args: Any) -> Tensor:
    from vqfast.kernels.unpack.triton import unpack_backward

    return unpack_backward(_batches(grad if grad.ndim == 4 else grad[..., None]), *args).view(
        args[1].shape[0], *grad.shape[3:]
    )


def _position_mask(*args: Any) -> Tensor:
    from vqfast.kernels.position_mask.triton import position_mask

    return position_mask(*args)


def _grain_entropy(*args: Any) -> Tensor:
    from vqfast.kernels.grain_entropy.triton import grain_entropy

    return grain_entropy(*args)


KERNELS = {
    "nearest": _on_its_device(_nearest),
    "nearest_counted": _on_its_device(_nearest_counted),
    "nearest_prepare": _nearest_prepare,
    "lookup": _on_its_device(_lookup),
    "lookup_backward": _on_its_device(_lookup_backward),
    "codebook_stats": _on_its_device(_codebook_stats),
    "q_sample": _on_its_device(_q_sample),
    "posterior": _on_its_device(_posterior),
    "posterior_backward": _on_its_device(_posterior_backward),
    "diffusion_loss": _on_its_device(_diffusion_loss),
    "scale_rows_": _on_its_device(_scale_rows_),
    "p_sample": _on_its_device(_p_sample),
    "matrix_loss": _on_its_device(_matrix_loss),
    "matrix_sample": _on_its_device(_matrix_sample),
    "pack": _on_its_device(_pack),
    "unpack": _on_its_device(_unpack),
    "unpack_backward": _on_its_device(_unpack_backward),
    "position_mask": _on_its_device(_position_mask),
    "grain_entropy": _on_its_device(_grain_entropy),
}
