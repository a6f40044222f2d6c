"""CUDA C++ kernels of the compiled extension `vqfast._cuda`.

Scratch memory comes from torch's allocator and work goes to torch's current stream, so every op can be captured in a
CUDA graph. What the runtime refuses is raised as RuntimeError with its own text.
"""

import torch
from torch import Tensor

from vqfast.ops.backends.compiled import CompiledKernels
from vqfast.ops.backends.layout import DTYPE

try:
    import vqfast._cuda as _cuda

    _REASON = None
except ModuleNotFoundError:
    _cuda = None
    _REASON = "the CUDA extension was not built: nvcc was not found when vqfast was installed, or VQFAST_CUDA=0"
except ImportError as error:
    _cuda = None
    _REASON = f"the CUDA extension cannot be loaded: {error}"

NAME = "cuda"
PRIORITY = 30
DEVICES = ("cuda",)

_MOST_STEP_CODES = 1024  # kMostStepCodes of csrc/cuda/launch.h
_MOST_ROWS = 2**31 - 65  # of codebook_stats: rows are numbered in 32 bits


def unavailable(device_type: str) -> str | None:
    if _cuda is None:
        return _REASON
    try:
        devices = _cuda.devices()
    except RuntimeError as error:
        return f"no CUDA device: {error}"
    if not devices:
        return "no CUDA device"
    oldest = min(int(target.removeprefix("sm_")) for target in _cuda.targets.replace(",", " ").split())
    for i, name in enumerate(devices):
        if int(name.removeprefix("sm_")) < oldest:
            return f"cuda:{i} is {name}, the extension was built for {_cuda.targets} (see VQFAST_CUDA_ARCHS)"
    return None


def unsupported(op: str, args: tuple) -> str | None:
    if op not in KERNELS:
        return f"it has no kernel for {op}"
    if op == "codebook_stats" and args[1].numel() > _MOST_ROWS:
        return f"{args[1].numel()} vectors, at most {_MOST_ROWS}"
    if op in ("matrix_loss", "matrix_sample") and args[0].shape[-1] > _MOST_STEP_CODES:
        return f"K = {args[0].shape[-1]} codes, at most {_MOST_STEP_CODES} are kept in shared memory"
    return None


class _CudaKernels(CompiledKernels):
    transposes = True

    def where(self, tensor: Tensor) -> tuple[int, ...]:
        return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream

    def search_memory(self, x: Tensor, codebook: Tensor, reranked: Tensor | None) -> tuple[Tensor | None, ...]:
        K, D = codebook.shape[-2:]
        heads = codebook.shape[0] if codebook.ndim == 3 else 1
        size = _cuda.nearest_scratch(x.numel() // (D * heads), D, K, x.device.index)
        return reranked, x.new_empty(size, dtype=torch.uint8)

    def stats_memory(self, x: Tensor, codebook_size: int) -> tuple[Tensor | None, ...]:
        D = x.shape[-1]
        size = _cuda.codebook_stats_scratch(DTYPE[x.dtype], x.numel() // max(D, 1), D, codebook_size)
        return (x.new_empty(size, dtype=torch.uint8),)

    def pack_memory(self, grains: Tensor, num_grains: int) -> tuple[Tensor | None, ...]:
        B, Hc, _ = grains.shape
        return (grains.new_empty(B * num_grains * Hc + B),)

    def unpack_memory(self, grains: Tensor, num_grains: int) -> tuple[Tensor | None, ...]:
        return (grains.new_empty(grains.numel() * 4 ** (num_grains - 1)),)


KERNELS = _CudaKernels(_cuda).kernels()
