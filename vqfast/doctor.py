"""What is installed, what was built, which backend would run and why another would not."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import vqfast
from vqfast.ops.registry import BACKENDS, status


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_extension() -> list[str]:
    try:
        from vqfast import _cpu
    except ImportError as error:
        return [f"not loaded: {error}"]
    lines = [f"instruction set {_cpu.isa()}, {torch.get_num_threads()} threads"]
    return lines + ([_cpu.isa_error()] if _cpu.isa_error() else [])


def _cuda_extension() -> list[str]:
    try:
        from vqfast import _cuda
    except ImportError:
        return [BACKENDS["cuda"].unavailable("cuda")]
    return [f"built for {_cuda.targets}, and PTX of the last for newer devices"]


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["cpu only: torch sees no CUDA device"]
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} {p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB")
    return found


def report() -> str:
    """A page of text for a person, and for a bug report."""
    sections = [
        ("vqfast", [vqfast.__version__]),
        ("python", [f"{platform.python_version()} ({sys.executable})"]),
        ("torch", [f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"]),
        ("triton", [_version_of("triton")]),
        ("devices", _devices()),
        ("CPU extension", _cpu_extension()),
        ("CUDA extension", _cuda_extension()),
    ]
    for device in ("cpu", "cuda"):
        rows = [f"{name}: {'ready' if reason is None else reason}" for name, reason in status(device).items()]
        sections.append((f"backends for {device} tensors, first choice first", rows))
    if os.environ.get("VQFAST_BACKEND"):
        sections.append(("VQFAST_BACKEND", [os.environ["VQFAST_BACKEND"]]))
    return "\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections)
