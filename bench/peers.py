"""Every benchmark and every contender in it. Another peer or another op joins here."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.case import Case
from bench.codebook import codebook_stats_case, quantize_step_case
from bench.diffusion import diffusion_loss_case, p_sample_case, posterior_case, q_sample_case
from bench.grains import grain_entropy_case, position_mask_case
from bench.matrix_diffusion import matrix_loss_case, matrix_sample_case
from bench.packing import dynamic_quantize_case, dynamic_quantize_step_case, pack_case, unpack_case
from bench.residual import residual_nearest_case
from bench.search import nearest_case
from vqfast.kernels.specs import CODEBOOK_STATS, DIFFUSION_LOSS, NEAREST, P_SAMPLE, Q_SAMPLE, RESIDUAL_NEAREST

CASES: dict[str, Callable[[Mapping[str, Any], torch.dtype, str], Case]] = {
    "nearest": nearest_case,
    "residual_nearest": residual_nearest_case,
    "quantize_step": quantize_step_case,
    "codebook_stats": codebook_stats_case,
    "q_sample": q_sample_case,
    "posterior": posterior_case,
    "diffusion_loss": diffusion_loss_case,
    "p_sample": p_sample_case,
    "matrix_loss": matrix_loss_case,
    "matrix_sample": matrix_sample_case,
    "pack": pack_case,
    "unpack": unpack_case,
    "dynamic_quantize": dynamic_quantize_case,
    "dynamic_quantize_step": dynamic_quantize_step_case,
    "position_mask": position_mask_case,
    "grain_entropy": grain_entropy_case,
}

F32, BF16 = torch.float32, torch.bfloat16

# The published sizes: 16 x 16 cells, 32 x 32 codes.
_GRID = dict(B=8, H=16, W=16, G=2)
_DYNAMIC = dict(B=8, H=16, W=16, K=1024, D=256)


def _packing_shapes(grid: Mapping[str, Any], dynamic: Mapping[str, Any]) -> dict[str, list]:
    codes = [(grid, torch.int64)]
    features = [(dynamic, F32)]
    images = [(dict(B=grid["B"], P=16, rows=grid["H"], columns=grid["W"]), F32)]
    return dict(
        pack=codes,
        unpack=codes,
        dynamic_quantize=features,
        dynamic_quantize_step=features,
        position_mask=codes,
        grain_entropy=images,
    )


# Every noise of closed form. Fewer tokens than of uniform noise, as the dense peers need seconds.
_NOISED = ("absorbing", "mask_and_replace", "marginal")


def _noised_shapes(shape: Mapping[str, Any]) -> list:
    return [(dict(shape, family=family), F32) for family in _NOISED]


# Grey levels, as D3PM has them.
_PIXELS = dict(B=32, L=256, K=256, T=1000)

# Seconds on two cores: the specs' own sizes.
CPU_SHAPES = {
    "nearest": [(shape, F32) for shape in NEAREST.bench_shapes],
    "residual_nearest": [(shape, F32) for shape in RESIDUAL_NEAREST.bench_shapes],
    "quantize_step": [(dict(N=8192, K=1024, D=256), F32), (dict(N=8192, K=8192, D=64), F32)],
    "codebook_stats": [(shape, F32) for shape in CODEBOOK_STATS.bench_shapes],
    "q_sample": [(shape, torch.int64) for shape in Q_SAMPLE.bench_shapes],
    "posterior": [(dict(B=8, L=256, K=1024, T=1000), F32)],
    "diffusion_loss": [
        *((shape, F32) for shape in DIFFUSION_LOSS.bench_shapes),
        *_noised_shapes(dict(B=8, L=256, K=1024, T=1000)),
    ],
    "p_sample": [
        *((shape, F32) for shape in P_SAMPLE.bench_shapes),
        *_noised_shapes(dict(B=8, L=256, K=1024, T=1000, step=10)),
    ],
    "matrix_loss": [(_PIXELS, F32)],
    "matrix_sample": [(dict(_PIXELS, step=10), F32)],
    **_packing_shapes(_GRID, _DYNAMIC),
}

# Sizes that fill a large GPU, the most wanted first: a run that meets its time limit leaves out the end of this list.
_TOKENS = dict(B=128, L=256, K=1024, T=1000)
CUDA_SHAPES = {
    "nearest": [
        (dict(N=8192, K=1024, D=256), F32),
        (dict(N=262144, K=8192, D=256), F32),
        (dict(N=262144, K=16384, D=8), F32),
        (dict(N=262144, K=8192, D=256), BF16),
        (dict(N=65536, K=8192, D=64), F32),
        (dict(N=262144, K=16384, D=8), BF16),
        (dict(N=8192, K=1024, D=256), BF16),
    ],
    "residual_nearest": [(dict(N=262144, K=1024, D=64, Q=8), F32)],
    "quantize_step": [(dict(N=65536, K=8192, D=64), F32), (dict(N=65536, K=1024, D=256), F32)],
    "codebook_stats": [(dict(N=65536, K=8192, D=64), F32), (dict(N=262144, K=1024, D=256), F32)],
    "q_sample": [(_TOKENS, torch.int64)],
    "posterior": [(dict(_TOKENS, B=64), F32)],
    "diffusion_loss": [(_TOKENS, F32), (_TOKENS, BF16), *_noised_shapes(_TOKENS)],
    "p_sample": [
        (dict(_TOKENS, step=10), F32),
        (dict(_TOKENS, step=10), BF16),
        *_noised_shapes(dict(_TOKENS, step=10)),
    ],
    "matrix_loss": [(_PIXELS, F32)],
    "matrix_sample": [(dict(_PIXELS, step=10), F32)],
    **_packing_shapes(dict(_GRID, B=30), dict(_DYNAMIC, B=30)),
}

# One of each kind of op, in milliseconds: for the tests of the benchmarks themselves.
TINY_SHAPES = {
    "nearest": [(dict(N=256, K=64, D=16), F32)],
    "residual_nearest": [(dict(N=256, K=32, D=8, Q=3), F32)],
    "quantize_step": [(dict(N=256, K=32, D=8), F32)],
    "codebook_stats": [(dict(N=256, K=32, D=8), F32)],
    "q_sample": [(dict(B=4, L=64, K=32, T=100), torch.int64)],
    "posterior": [(dict(B=4, L=16, K=32, T=100), F32)],
    "diffusion_loss": [(dict(B=4, L=16, K=32, T=100), F32), *_noised_shapes(dict(B=4, L=16, K=32, T=100))],
    "p_sample": [
        (dict(B=4, L=64, K=32, T=100, step=10), F32),
        *_noised_shapes(dict(B=4, L=64, K=32, T=100, step=10)),
    ],
    "matrix_loss": [(dict(B=4, L=64, K=32, T=100), F32)],
    "matrix_sample": [(dict(B=4, L=64, K=32, T=100, step=10), F32)],
    **_packing_shapes(dict(B=2, H=4, W=4, G=2), dict(B=2, H=4, W=4, K=32, D=8)),
}


def cases(device: str, ops: str = "", *, tiny: bool = False) -> list[Case]:
    """The benchmarks for a device: first the first size of every op, then the second, and so on.

    Args:
        ops: comma-separated names, empty for all.

    Raises:
        ValueError: a name that is none of CASES.
    """
    wanted = [op.strip() for op in ops.split(",") if op.strip()] or list(CASES)
    unknown = [op for op in wanted if op not in CASES]
    if unknown:
        raise ValueError(f"no benchmark of {', '.join(unknown)}; there are {', '.join(CASES)}")
    shapes = TINY_SHAPES if tiny else CPU_SHAPES if torch.device(device).type == "cpu" else CUDA_SHAPES
    longest = max(len(shapes[op]) for op in wanted)
    return [
        CASES[op](*shapes[op][position], device)
        for position in range(longest)
        for op in wanted
        if position < len(shapes[op])
    ]
