"""Nearest-code search for tests and benchmarks. The result is an index: it must be equal, not close."""

import torch
from torch import Tensor

from vqfast.kernels.nearest.reference import nearest
from vqfast.kernels.spec import Shape, Spec, generator


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    """Vectors and codes around a common offset (`offset`, default 0), Gaussian with `scale` (default 1).

    (x, codebook), and for a `metric` other than l2 (x, codebook, no mask, nothing prepared, metric).
    """
    g = generator(device, seed)
    scale, offset = shape.get("scale", 1.0), shape.get("offset", 0.0)
    x = torch.randn(shape["N"], shape["D"], generator=g, device=device, dtype=torch.float64)
    codebook = torch.randn(shape["K"], shape["D"], generator=g, device=device, dtype=torch.float64)
    pair = (x * scale + offset).to(dtype), (codebook * scale + offset).to(dtype)
    return (*pair, None, None, shape["metric"]) if "metric" in shape else pair


def check(got: Tensor, args: tuple) -> None:
    x, codebook, *options = args
    want = nearest(x, codebook, metric=options[2] if options else "l2")
    wrong = int((got != want).sum())
    if got.shape != want.shape or got.dtype != torch.int64 or wrong:
        first = (got != want).nonzero()[0].tolist() if wrong and got.shape == want.shape else None
        raise AssertionError(
            f"nearest: {wrong} of {want.numel()} indices differ from the definition, the first at {first}; "
            f"got {got.dtype} {tuple(got.shape)}, expected int64 {tuple(want.shape)}"
        )


SPEC = Spec(
    op="nearest",
    reference=nearest,
    inputs=inputs,
    check=check,
    test_shapes=(
        dict(N=64, K=32, D=16),
        dict(N=1, K=1, D=1),
        dict(N=0, K=5, D=3),
        dict(N=37, K=1, D=7),
        dict(N=5, K=123, D=123),
        dict(N=130, K=257, D=65),
        dict(N=33, K=40, D=1),
        dict(N=200, K=96, D=8, offset=1000.0),
        dict(N=64, K=64, D=32, scale=1e-6),
        dict(N=19, K=50, D=600),
        *(
            shape | dict(metric=metric)
            for metric in ("dot", "cosine")
            for shape in (
                dict(N=33, K=40, D=1),
                dict(N=70, K=75, D=35),
                dict(N=40, K=96, D=8, offset=1000.0),
                dict(N=40, K=30, D=16, scale=1e-6),
            )
        ),
    ),
    bench_shapes=(
        dict(N=8192, K=512, D=64),
        dict(N=8192, K=1024, D=256),
        dict(N=8192, K=8192, D=64),
        dict(N=8192, K=16384, D=8),
        dict(N=8192, K=16384, D=256),
    ),
    bytes_moved=lambda s, dtype: (s["N"] + s["K"]) * s["D"] * dtype.itemsize + 8 * s["N"],
    flops=lambda s: 2 * s["N"] * s["K"] * s["D"],
)
