"""Codebook statistics for tests and benchmarks."""

import torch
from torch import Tensor

from vqfast.kernels.codebook_stats.reference import codebook_stats
from vqfast.kernels.lookup.spec import inputs as lookup_inputs
from vqfast.kernels.spec import Shape, Spec, assert_close, generator, in_float64


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    x, _, indices = lookup_inputs(shape, dtype, device, seed)
    weights = None
    if shape.get("weighted"):
        weights = torch.rand(shape["N"], generator=generator(device, seed + 1), device=device)
        weights = weights.to(torch.promote_types(dtype, torch.float32))
    return x, indices, weights, shape["K"]


def check(got: tuple[Tensor, Tensor], args: tuple) -> None:
    counts, sums = codebook_stats(*in_float64(args))
    # A code's sum grows with its count; rounding grows with the terms added, not with the result.
    tolerance = 1e-12 if args[0].dtype == torch.float64 else 1e-6 * max(1.0, float(counts.max()))
    assert_close(got[0], counts, rtol=0, atol=tolerance, what="codebook_stats: counts")
    assert_close(got[1], sums, rtol=0, atol=tolerance * 4, what="codebook_stats: sums")


SPEC = Spec(
    op="codebook_stats",
    reference=codebook_stats,
    inputs=inputs,
    check=check,
    test_shapes=(
        dict(N=64, K=32, D=16),
        dict(N=1, K=1, D=1),
        dict(N=0, K=5, D=3),
        dict(N=500, K=1, D=7, weighted=True),
        dict(N=123, K=5, D=123, masked=True, weighted=True),
        dict(N=2100, K=300, D=65, masked=True),
        dict(N=19, K=5000, D=3),
    ),
    bench_shapes=(dict(N=8192, K=1024, D=256), dict(N=65536, K=8192, D=64)),
    bytes_moved=lambda s, dtype: s["N"] * (s["D"] * dtype.itemsize + 8) + 4 * s["K"] * (s["D"] + 1),
    flops=lambda s: s["N"] * s["D"],
)
