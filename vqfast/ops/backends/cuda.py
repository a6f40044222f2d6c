"""CUDA C++ kernels of the compiled extension `vqfast._cuda`."""

NAME = "cuda"
PRIORITY = 30
DEVICES = ("cuda",)


def unavailable(device_type: str) -> str | None:
    try:
        from vqfast import _cuda  # noqa: F401
    except ImportError:
        return "the CUDA extension was not built (nvcc was not found, or VQFAST_CUDA=0)"
    return None


def unsupported(op: str, args: tuple) -> str | None:
    return None if op in KERNELS else f"it has no kernel for {op}"


KERNELS = {}
