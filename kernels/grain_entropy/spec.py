"""Patch entropy, for tests and benchmarks."""

import torch
from torch import Tensor

from vqfast.kernels.grain_entropy.reference import grain_entropy
from vqfast.kernels.spec import Shape, Spec, assert_close, generator


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    """Noise of which each patch has an amount of its own, the first none: a flat patch."""
    g = generator(device, seed)
    B, C, P, rows, columns = shape["B"], shape.get("C", 3), shape["P"], shape["rows"], shape["columns"]
    amount = torch.linspace(0, 1, rows * columns, device=device).reshape(rows, columns)
    amount = amount.repeat_interleave(P, 0).repeat_interleave(P, 1)
    images = (2 * torch.rand(B, C, rows * P, columns * P, generator=g, device=device) - 1) * amount
    return images.to(dtype), P, shape.get("bins", 32), shape.get("sigma", 0.01), -1.0, 1.0


def check(got: Tensor, args: tuple) -> None:
    want = grain_entropy(args[0].double(), *args[1:])
    # float32: a grey level is off by 6e-8, which moves exp(-((v - bin) / sigma)^2 / 2) by 6e-6 of its value per unit of
    # (v - bin) / sigma, at most 7 where it weighs anything.
    tolerance = 1e-11 if args[0].dtype == torch.float64 else 1e-5
    assert_close(got, want, rtol=tolerance, atol=tolerance, what="grain_entropy")


SPEC = Spec(
    op="grain_entropy",
    reference=grain_entropy,
    inputs=inputs,
    check=check,
    test_shapes=(
        dict(B=2, P=8, rows=3, columns=2),
        dict(B=1, P=1, rows=1, columns=1, C=1),
        dict(B=0, P=4, rows=2, columns=2),
        dict(B=2, P=5, rows=3, columns=7, bins=7, sigma=0.3),
        dict(B=1, P=16, rows=4, columns=4, C=1),
        dict(B=1, P=19, rows=2, columns=1, bins=200, sigma=0.004),
    ),
    bench_shapes=(dict(B=8, P=16, rows=16, columns=16),),
    bytes_moved=lambda s, dtype: s["B"] * s["rows"] * s["columns"] * (s.get("C", 3) * s["P"] ** 2 * dtype.itemsize + 4),
    flops=lambda s: 30 * s["B"] * s["rows"] * s["columns"] * s["P"] ** 2,
)
