"""Packing, for tests and benchmarks."""

import torch
from torch import Tensor

from vqfast.kernels.pack.reference import pack
from vqfast.kernels.spec import Shape, Spec, generator


def random_grains(shape: Shape, device: torch.device | str, seed: int) -> Tensor:
    """(B, H, W) in [0, G), coarse and fine in equal parts."""
    return torch.randint(
        shape["G"], (shape["B"], shape["H"], shape["W"]), generator=generator(device, seed), device=device
    )


def random_values(size: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int) -> Tensor:
    g = generator(device, seed)
    if dtype == torch.int64:
        return torch.randint(-(1 << 40), 1 << 40, size, generator=g, device=device)
    return torch.randn(size, generator=g, device=device).to(dtype)


def tokens_of(shape: Shape) -> int:
    return shape["B"] * shape["H"] * shape["W"] * 4 ** (shape["G"] - 1)


def row_of(shape: Shape) -> tuple[int, ...]:
    """What follows (T,) in the shape of packed values: codes have no features."""
    return (shape["D"],) if "D" in shape else ()


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    factor = 2 ** (shape["G"] - 1)
    size = (shape["B"], shape["H"] * factor, shape["W"] * factor, *row_of(shape))
    values = random_values(size, dtype, device, seed)
    capacity = tokens_of(shape) // shape.get("short", 1)
    return values, random_grains(shape, device, seed + 1), bool(shape.get("region")), capacity


def check(got: tuple[Tensor, ...], args: tuple) -> None:
    for name, a, b in zip(("values", "cu_seqlens", "positions", "grain_ids"), got, pack(*args), strict=True):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            raise AssertionError(f"pack: {name} differs: {a.dtype} {tuple(a.shape)}, expected {b.dtype} {b.shape}")


TEST_SHAPES = (
    dict(B=3, H=4, W=4, G=2),
    dict(B=1, H=1, W=1, G=1),
    dict(B=0, H=2, W=3, G=2, D=3),
    dict(B=2, H=5, W=3, G=3, D=7, region=True),
    dict(B=3, H=3, W=5, G=3, D=33),
    dict(B=2, H=3, W=5, G=3, region=True),
    dict(B=3, H=4, W=5, G=2, D=16, short=3),
    dict(B=1, H=35, W=2, G=2),
    dict(B=2, H=1, W=3, G=4),
)
BENCH_SHAPES = (dict(B=8, H=16, W=16, G=2), dict(B=30, H=16, W=16, G=2, D=256))

SPEC = Spec(
    op="pack",
    reference=pack,
    inputs=inputs,
    check=check,
    test_shapes=TEST_SHAPES,
    bench_shapes=BENCH_SHAPES,
    bytes_moved=lambda s, dtype: (
        tokens_of(s) * (2 * s.get("D", 1) * dtype.itemsize + 16) + 8 * s["B"] * s["H"] * s["W"]
    ),
    flops=lambda s: 0,
    dtypes=(torch.int64, torch.float32, torch.bfloat16, torch.float64),
)
