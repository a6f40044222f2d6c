"""SIMD kernels of the compiled extension `vqfast._cpu`."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from vqfast.kernels.nearest.library import by_product, serves
from vqfast.kernels.transition_matmul.library import by_samples
from vqfast.kernels.transition_matmul.reference import on_chain
from vqfast.ops.backends.compiled import CompiledKernels
from vqfast.ops.backends.layout import DTYPE, METRIC, as_rows
from vqfast.ops.checks import check_values

try:
    import vqfast._cpu as _cpu

    _REASON = None
except ImportError as error:
    _cpu = None
    _REASON = f"the CPU extension cannot be loaded, pip install -e . builds it: {error}"

NAME = "cpu"
PRIORITY = 30
DEVICES = ("cpu",)


def unavailable(device_type: str) -> str | None:
    return _REASON


def unsupported(op: str, args: tuple) -> str | None:
    return None if op in KERNELS else f"it has no kernel for {op}"


# Multiply-adds, N K D: with fewer a search is over before a library's product is called.
_LEAST_UNFUSED = 1 << 18


def _nearest(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None = None,
    prepared: Tensor | None = None,
    metric: str = "l2",
    exact: bool = True,
) -> Tensor:
    """Fused, or by the library's product where the table has that faster."""
    products = x.numel() * codebook.shape[-2]
    if products >= _LEAST_UNFUSED and serves(x, codebook, mask, prepared, metric, exact):
        K, D = codebook.shape
        if _cpu.nearest_path(x.numel() // D, K, D) == "unfused":
            return by_product(x, codebook, metric, lambda rows: _COMPILED.nearest(rows, codebook, metric=metric))
    return _COMPILED.nearest(x, codebook, mask, prepared, metric, exact)


def _nearest_prepare(codebook: Tensor, metric: str) -> Tensor:
    """Memory that only this process and its instruction set can read."""
    codebook = codebook.contiguous()
    K, D = codebook.shape[-2:]
    heads = codebook.shape[0] if codebook.ndim == 3 else 1
    prepared = torch.empty(_cpu.nearest_prepare_bytes(heads, D, K), dtype=torch.uint8)
    _cpu.nearest_prepare(
        DTYPE[codebook.dtype], METRIC[metric], heads, D, codebook.data_ptr(), K, prepared.data_ptr()
    )  # fmt: skip
    return prepared


def _residual_nearest(x: Tensor, codebooks: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All stages of a chunk of rows before the next."""
    rows, (Q, K, D) = as_rows(x), codebooks.shape
    stride = codebooks.stride(0)
    # One codebook that was expanded stays one.
    codebooks = codebooks[0].contiguous() if stride == 0 else codebooks.contiguous()
    mask = None if mask is None else mask.contiguous()
    indices, quantized = x.new_empty((*x.shape[:-1], Q), dtype=torch.int64), x.new_empty(x.shape)
    _cpu.residual_nearest(
        DTYPE[x.dtype], rows.view, D, codebooks.data_ptr(), Q, K * D if stride else 0, K,
        0 if mask is None else mask.data_ptr(), indices.data_ptr(), quantized.data_ptr(),
    )  # fmt: skip
    return indices, quantized


def _dynamic_lookup(
    features: Tensor, codebook: Tensor, indices: Tensor, grains: Tensor, num_grains: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, codebook, indices, grains = (
        as_rows(features),
        codebook.contiguous(),
        indices.contiguous(),
        grains.contiguous(),
    )
    K, D = codebook.shape
    quantized = features.new_empty(features.shape)
    error = features.new_empty(features.shape[:3], dtype=torch.promote_types(features.dtype, torch.float32))
    counts = features.new_empty(K, dtype=torch.int64)
    _cpu.dynamic_lookup(
        DTYPE[features.dtype], rows.view, D, codebook.data_ptr(), K, indices.data_ptr(), grains.data_ptr(),
        *grains.shape, num_grains, quantized.data_ptr(), error.data_ptr(), counts.data_ptr(),
    )  # fmt: skip
    return quantized, error, counts


def _dynamic_lookup_backward(
    grad_quantized: Tensor,
    grad_error: Tensor,
    features: Tensor,
    codebook: Tensor,
    indices: Tensor,
    grains: Tensor,
    num_grains: int,
) -> Tensor:
    grad_rows, rows, grad_error = as_rows(grad_quantized), as_rows(features), grad_error.contiguous()
    codebook, indices, grains = codebook.contiguous(), indices.contiguous(), grains.contiguous()
    grad_features = features.new_empty(features.shape)
    _cpu.dynamic_lookup_backward(
        DTYPE[features.dtype], grad_rows.view, grad_error.data_ptr(), rows.view, codebook.shape[1],
        codebook.data_ptr(), indices.data_ptr(), grains.data_ptr(), *grains.shape, num_grains,
        grad_features.data_ptr(),
    )  # fmt: skip
    return grad_features


def _multiply(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows times a matrix. Early in a chain many products lie below the smallest normal number, each of which costs a
    BLAS a hundred cycles."""
    if rows.dtype != torch.float64:
        return rows @ matrix
    transpose = not matrix.is_contiguous()
    rows, matrix = rows.contiguous(), (matrix.T if transpose else matrix).contiguous()
    K = matrix.shape[0]
    out = torch.empty_like(rows)
    _cpu.matrix_product(rows.data_ptr(), rows.numel() // K, matrix.data_ptr(), K, transpose, out.data_ptr())
    return out


def _looks_at_values(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that finds a value out of range by itself; the op's check then says which."""

    @wraps(kernel)
    def run(*args: Any) -> Any:
        try:
            return kernel(*args)
        except IndexError:
            check_values(op, args)
            raise

    run.looks_at_values = True
    return run


_COMPILED = CompiledKernels(_cpu)
KERNELS = _COMPILED.kernels() | {
    "nearest": _nearest,
    "nearest_prepare": _nearest_prepare,
    "residual_nearest": _residual_nearest,
    "transition_matmul": on_chain(partial(by_samples, multiply=_multiply)),
    "dynamic_lookup": _dynamic_lookup,
    "dynamic_lookup_backward": _dynamic_lookup_backward,
}
KERNELS |= {op: _looks_at_values(op, KERNELS[op]) for op in ("pack", "position_mask")}
