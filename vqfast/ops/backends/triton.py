"""Triton kernels, on CUDA tensors; with TRITON_INTERPRET=1 on CPU tensors, in Triton's interpreter."""

import os
from importlib.util import find_spec

NAME = "triton"
PRIORITY = 20
DEVICES = ("cuda", "cpu")


def unavailable(device_type: str) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it takes CPU tensors only in the interpreter (TRITON_INTERPRET=1)"
    return None


def unsupported(op: str, args: tuple) -> str | None:
    return None if op in KERNELS else f"it has no kernel for {op}"


KERNELS = {}
