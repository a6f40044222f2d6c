"""Residual search for tests and benchmarks. Indices and sums must be equal, not close."""

import torch
from torch import Tensor

from vqfast.kernels.residual_nearest.reference import residual_nearest
from vqfast.kernels.spec import Shape, Spec, generator


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    """Gaussian vectors, and codes that get smaller from stage to stage, as trained ones do.

    `shared`: all stages have the first codebook. `masked`: a third of the vectors does not count.
    """
    g = generator(device, seed)
    N, K, D, Q = (shape[key] for key in "NKDQ")
    x = torch.randn(N, D, generator=g, device=device, dtype=torch.float64).to(dtype)
    codebooks = torch.randn(Q, K, D, generator=g, device=device, dtype=torch.float64)
    codebooks = (codebooks * 0.7 ** torch.arange(Q, device=device)[:, None, None]).to(dtype)
    if shape.get("shared"):
        return x, codebooks[0].expand(Q, K, D)
    if shape.get("masked"):
        return x, codebooks, torch.rand(N, generator=g, device=device) > 1 / 3
    return x, codebooks


def check(got: tuple[Tensor, Tensor], args: tuple) -> None:
    # Not widened: what each stage leaves is rounded to the dtype.
    want = residual_nearest(*args)
    for name, g, w in zip(("indices", "quantized"), got, want, strict=True):
        if g.shape != w.shape or g.dtype != w.dtype or not torch.equal(g, w):
            where = (g != w).nonzero()[:1].tolist() if g.shape == w.shape else None
            raise AssertionError(
                f"residual_nearest: {name} differ from the definition, first at {where}; got {g.dtype} "
                f"{tuple(g.shape)}, expected {w.dtype} {tuple(w.shape)}"
            )


SPEC = Spec(
    op="residual_nearest",
    reference=residual_nearest,
    inputs=inputs,
    check=check,
    test_shapes=(
        dict(N=64, K=32, D=16, Q=4),
        dict(N=1, K=1, D=1, Q=1),
        dict(N=0, K=5, D=3, Q=2),
        dict(N=37, K=1, D=7, Q=3),
        dict(N=130, K=257, D=35, Q=3, masked=True),
        dict(N=90, K=96, D=8, Q=8, shared=True),
        dict(N=19, K=50, D=300, Q=2),
    ),
    bench_shapes=(dict(N=8192, K=1024, D=64, Q=8), dict(N=8192, K=1024, D=8, Q=8)),
    bytes_moved=lambda s, dtype: (2 * s["N"] + s["Q"] * s["K"]) * s["D"] * dtype.itemsize + 8 * s["N"] * s["Q"],
    flops=lambda s: 2 * s["N"] * s["K"] * s["D"] * s["Q"],
)
