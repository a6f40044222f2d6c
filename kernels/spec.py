"""The record that describes an op to the tests and to the benchmarks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Spec:
    """One op: how to make its inputs, what it should return, what it costs.

    `inputs(shape, dtype, device, seed)` returns the positional arguments of `torch.ops.vqfast.<op>`.
    `check(got, args)` raises AssertionError where `got` differs from the float64 reference by more than the
    op's documented tolerance; tests call it on every backend, benchmarks call it before they time one.
    """

    op: str
    reference: Callable[..., Any]
    inputs: Callable[[Shape, torch.dtype, torch.device | str, int], tuple]
    check: Callable[[Any, tuple], None]
    test_shapes: tuple[Shape, ...]
    bench_shapes: tuple[Shape, ...]
    bytes_moved: Callable[[Shape, torch.dtype], int]
    flops: Callable[[Shape], int]
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.float64, torch.bfloat16, torch.float16))


def generator(device: torch.device | str, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def in_float64(args: tuple) -> tuple:
    """The same arguments with every floating-point tensor widened, for the reference."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def assert_close(got: Tensor, want: Tensor, rtol: float, atol: float, what: str) -> None:
    if got.shape != want.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    torch.testing.assert_close(
        got.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )
