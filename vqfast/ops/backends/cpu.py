"""SIMD kernels of the compiled extension `vqfast._cpu`."""

from vqfast.ops.backends.compiled import CompiledKernels

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


KERNELS = CompiledKernels(_cpu).kernels()
