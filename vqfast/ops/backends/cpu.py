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
    _cpu.nearest(
        DTYPE[x.dtype], rows.view, x.shape[-1], codebook.data_ptr(), codebook.shape[0], indices.data_ptr()
    )
    return indices


KERNELS = {
    "nearest": _nearest,
}
