"""SIMD kernels of the compiled extension `vqfast._cpu`."""

import torch
from torch import Tensor

from vqfast.ops.backends.layout import DTYPE, as_rows

try:
    from vqfast import _cpu
except ImportError as error:
    _cpu = None
    _REASON = f"the CPU extension cannot be loaded; run pip install -e . ({error})"

NAME = "cpu"
PRIORITY = 30
DEVICES = ("cpu",)


def unavailable(device_type: str) -> str | None:
    return _REASON if _cpu is None else None


def unsupported(op: str, args: tuple) -> str | None:
    return None if op in KERNELS else f"it has no kernel for {op}"


def _nearest(x: Tensor, codebook: Tensor) -> Tensor:
    indices = torch.empty(x.shape[:-1], dtype=torch.int64)
    rows, codebook = as_rows(x), codebook.contiguous()
    _cpu.nearest(DTYPE[x.dtype], rows.view, x.shape[-1], codebook.data_ptr(), codebook.shape[0], indices.data_ptr())
    return indices


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _lookup(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, codebook, indices = as_rows(x), codebook.contiguous(), indices.contiguous()
    K, D = codebook.shape
    quantized = torch.empty(x.shape, dtype=x.dtype)
    error = torch.empty(x.shape[:-1], dtype=_accumulator(x))
    counts = torch.empty(K, dtype=torch.int64)
    _cpu.lookup(
        DTYPE[x.dtype], rows.view, D, codebook.data_ptr(), K, indices.data_ptr(),
        quantized.data_ptr(), error.data_ptr(), counts.data_ptr(),
    )  # fmt: skip
    return quantized, error, counts


def _lookup_backward(
    grad_quantized: Tensor, grad_error: Tensor, x: Tensor, codebook: Tensor, indices: Tensor
) -> Tensor:
    grad_rows, rows = as_rows(grad_quantized), as_rows(x)
    grad_error, codebook, indices = grad_error.contiguous(), codebook.contiguous(), indices.contiguous()
    K, D = codebook.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    _cpu.lookup_backward(
        DTYPE[x.dtype], grad_rows.view, grad_error.data_ptr(), rows.view, D, codebook.data_ptr(), K,
        indices.data_ptr(), grad_x.data_ptr(),
    )  # fmt: skip
    return grad_x


def _codebook_stats(x: Tensor, indices: Tensor, weights: Tensor | None, codebook_size: int) -> tuple[Tensor, Tensor]:
    rows, indices = as_rows(x), indices.contiguous()
    D, accumulator = x.shape[-1], _accumulator(x)
    if weights is not None:
        weights = weights.to(accumulator).contiguous()
    counts = torch.empty(codebook_size, dtype=accumulator)
    sums = torch.empty(codebook_size, D, dtype=accumulator)
    _cpu.codebook_stats(
        DTYPE[x.dtype], rows.view, D, indices.data_ptr(), _address(weights), codebook_size,
        counts.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    return counts, sums


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _uniform_q_sample(x0: Tensor, t: Tensor, alpha_bar: Tensor, codebook_size: int, key: Tensor) -> Tensor:
    x0, t, alpha_bar, key = x0.contiguous(), t.contiguous(), alpha_bar.contiguous(), key.contiguous()
    x_t = torch.empty(x0.shape, dtype=torch.int64)
    _cpu.uniform_q_sample(
        x0.data_ptr(), t.data_ptr(), alpha_bar.data_ptr(), alpha_bar.shape[0] - 1, *x0.shape, codebook_size,
        key.data_ptr(), x_t.data_ptr(),
    )  # fmt: skip
    return x_t


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
    logits, x0, x_t, t, s = (a.contiguous() for a in (logits, x0, x_t, t, s))
    alpha_bar, scale = alpha_bar.contiguous(), scale.contiguous()
    loss = torch.empty(x0.shape, dtype=_accumulator(logits))
    grad = torch.empty(logits.shape if with_grad else (0,), dtype=logits.dtype)
    _cpu.uniform_diffusion_loss(
        DTYPE[logits.dtype], logits.data_ptr(), x0.data_ptr(), x_t.data_ptr(), t.data_ptr(), s.data_ptr(),
        alpha_bar.data_ptr(), alpha_bar.shape[0] - 1, *logits.shape, scale.data_ptr(), aux_weight,
        loss.data_ptr(), grad.data_ptr() if with_grad else 0,
    )  # fmt: skip
    return loss, grad


def _scale_rows_(rows: Tensor, scale: Tensor) -> None:
    K = rows.shape[-1]
    R = rows.numel() // max(K, 1)
    # One number for all rows (the gradient of a mean or a sum) is read in place.
    stride = 0 if all(step == 0 or size == 1 for size, step in zip(scale.shape, scale.stride(), strict=True)) else 1
    scale = scale.to(_accumulator(rows))
    scale = scale if stride == 0 else scale.contiguous()
    if rows.is_contiguous():
        _cpu.scale_rows(DTYPE[rows.dtype], rows.data_ptr(), R, K, scale.data_ptr(), stride)
    else:
        rows.mul_(scale[..., None])


def _uniform_p_sample(
    logits: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    alpha_bar: Tensor,
    known: Tensor | None,
    temperature: float,
    key: Tensor,
) -> Tensor:
    logits, x_t, t, s = (a.contiguous() for a in (logits, x_t, t, s))
    alpha_bar, key = alpha_bar.contiguous(), key.contiguous()
    known = None if known is None else known.contiguous()
    x_s = torch.empty(x_t.shape, dtype=torch.int64)
    _cpu.uniform_p_sample(
        DTYPE[logits.dtype], logits.data_ptr(), x_t.data_ptr(), t.data_ptr(), s.data_ptr(),
        alpha_bar.data_ptr(), alpha_bar.shape[0] - 1, *logits.shape, _address(known), temperature,
        key.data_ptr(), x_s.data_ptr(),
    )  # fmt: skip
    return x_s


KERNELS = {
    "nearest": _nearest,
    "lookup": _lookup,
    "lookup_backward": _lookup_backward,
    "codebook_stats": _codebook_stats,
    "uniform_q_sample": _uniform_q_sample,
    "uniform_diffusion_loss": _uniform_diffusion_loss,
    "scale_rows_": _scale_rows_,
    "uniform_p_sample": _uniform_p_sample,
}
