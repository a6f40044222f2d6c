"""SIMD kernels of the compiled extension `vqfast._cpu`."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from vqfast.kernels.transition_matmul.library import by_samples
from vqfast.ops.backends.compiled import CompiledKernels
from vqfast.ops.backends.layout import DTYPE, METRIC
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


KERNELS = CompiledKernels(_cpu).kernels() | {
    "nearest_prepare": _nearest_prepare,
    "transition_matmul": by_samples,
}
KERNELS |= {op: _looks_at_values(op, KERNELS[op]) for op in ("pack", "position_mask")}
