"""Unpacking and its backward, for tests and benchmarks."""

import torch
from torch import Tensor

from vqfast.kernels.pack.reference import pack
from vqfast.kernels.pack.spec import TEST_SHAPES as PACK_SHAPES
from vqfast.kernels.pack.spec import inputs as pack_inputs
from vqfast.kernels.pack.spec import random_values, row_of, tokens_of
from vqfast.kernels.spec import Shape, Spec, assert_close, generator
from vqfast.kernels.unpack.reference import unpack, unpack_backward


def packed(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple[Tensor, ...]:
    """values, cu_seqlens, positions, grain_ids, grains. `shuffled`: each image's tokens in random order, some of
    them at the place of others, some out of range."""
    values, grains, region, capacity = pack_inputs(shape, dtype, device, seed)
    tokens, cu_seqlens, positions, grain_ids = pack(values, grains, region, capacity)
    if shape.get("shuffled"):
        g = generator(device, seed + 2)
        bounds = cu_seqlens.tolist()
        for begin, end in zip(bounds, bounds[1:], strict=False):
            order = begin + torch.randperm(end - begin, generator=g, device=device)
            positions[begin:end], grain_ids[begin:end] = positions[order], grain_ids[order]
        positions[::7] = positions[1::7].repeat(2)[: len(positions[::7])]
        positions[3::11], positions[5::13] = -5, 1 << 40
        grain_ids[7::17], grain_ids[9::19] = -1, shape["G"]
    return tokens, cu_seqlens, positions, grain_ids, grains


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    return *packed(shape, dtype, device, seed), shape["G"], not shape.get("corner", False)


def check(got: Tensor, args: tuple) -> None:
    want = unpack(*args)
    if got.dtype != want.dtype or got.shape != want.shape or not torch.equal(got, want):
        raise AssertionError(f"unpack: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}")


def backward_inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    factor = 2 ** (shape["G"] - 1)
    size = (shape["B"], shape["H"] * factor, shape["W"] * factor, *row_of(shape))
    grad = random_values(size, dtype, device, seed + 5)
    return grad, *packed(shape, dtype, device, seed)[1:], shape["G"]


# Sums of up to 4^(G-1) values, and the rounding of a low-precision result.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def check_backward(got: Tensor, args: tuple) -> None:
    want = unpack_backward(args[0].double(), *args[1:])
    tolerance = TOLERANCE[args[0].dtype]
    assert_close(got, want, rtol=tolerance, atol=4 * tolerance, what="unpack_backward")


TEST_SHAPES = (
    *PACK_SHAPES,
    dict(B=3, H=3, W=4, G=3, D=5, shuffled=True),
    dict(B=3, H=4, W=3, G=2, shuffled=True, corner=True),
)
BENCH_SHAPES = (dict(B=8, H=16, W=16, G=2), dict(B=30, H=16, W=16, G=2, D=256))


def _bytes(s: Shape, dtype: torch.dtype) -> int:
    return tokens_of(s) * (2 * s.get("D", 1) * dtype.itemsize + 16) + 8 * s["B"] * s["H"] * s["W"]


SPEC = Spec(
    op="unpack",
    reference=unpack,
    inputs=inputs,
    check=check,
    test_shapes=TEST_SHAPES,
    bench_shapes=BENCH_SHAPES,
    bytes_moved=_bytes,
    flops=lambda s: 0,
    dtypes=(torch.int64, torch.float32, torch.bfloat16, torch.float64),
)

BACKWARD_SPEC = Spec(
    op="unpack_backward",
    reference=unpack_backward,
    inputs=backward_inputs,
    check=check_backward,
    test_shapes=TEST_SHAPES,
    bench_shapes=BENCH_SHAPES,
    bytes_moved=_bytes,
    flops=lambda s: tokens_of(s) * s.get("D", 1),
)
