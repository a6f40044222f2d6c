"""Codebook lookup and its backward, for tests and benchmarks."""

import torch
from torch import Tensor

from vqfast.kernels.lookup.reference import lookup, lookup_backward
from vqfast.kernels.spec import Shape, Spec, assert_close, generator, in_float64

# Sums of D squares and the rounding of a low-precision result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    """Every seventh position is masked where `masked` is set."""
    g = generator(device, seed)
    x = torch.randn(shape["N"], shape["D"], generator=g, device=device).to(dtype)
    codebook = torch.randn(shape["K"], shape["D"], generator=g, device=device).to(dtype)
    indices = torch.randint(shape["K"], (shape["N"],), generator=g, device=device)
    if shape.get("masked"):
        indices[::7] = -1
    return x, codebook, indices


def check(got: tuple[Tensor, Tensor, Tensor], args: tuple) -> None:
    quantized, error, counts = got
    want_quantized, want_error, want_counts = lookup(*in_float64(args))
    if not torch.equal(quantized.double(), want_quantized):
        raise AssertionError("lookup: quantized is not the codes themselves")
    accumulate = 1e-12 if args[0].dtype == torch.float64 else 2e-6
    assert_close(error, want_error, rtol=accumulate, atol=accumulate, what="lookup: squared_error")
    if not torch.equal(counts, want_counts):
        raise AssertionError(f"lookup: counts {counts.tolist()}, expected {want_counts.tolist()}")


def backward_inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    x, codebook, indices = inputs(shape, dtype, device, seed)
    g = generator(device, seed + 1)
    grad_quantized = torch.randn(x.shape, generator=g, device=device).to(dtype)
    grad_error = torch.randn(x.shape[:-1], generator=g, device=device)
    return grad_quantized, grad_error.to(torch.promote_types(dtype, torch.float32)), x, codebook, indices


def check_backward(got: Tensor, args: tuple) -> None:
    want = lookup_backward(*in_float64(args))
    tolerance = TOLERANCE[args[2].dtype]
    assert_close(got, want, rtol=tolerance, atol=tolerance, what="lookup_backward")


TEST_SHAPES = (
    dict(N=64, K=32, D=16),
    dict(N=1, K=1, D=1),
    dict(N=0, K=5, D=3),
    dict(N=123, K=5, D=123, masked=True),
    dict(N=2100, K=300, D=65, masked=True),
    dict(N=19, K=50, D=600),
)
BENCH_SHAPES = (dict(N=8192, K=1024, D=256), dict(N=65536, K=8192, D=64))

SPEC = Spec(
    op="lookup",
    reference=lookup,
    inputs=inputs,
    check=check,
    test_shapes=TEST_SHAPES,
    bench_shapes=BENCH_SHAPES,
    bytes_moved=lambda s, dtype: 3 * s["N"] * s["D"] * dtype.itemsize + 12 * s["N"] + 8 * s["K"],
    flops=lambda s: 3 * s["N"] * s["D"],
)

BACKWARD_SPEC = Spec(
    op="lookup_backward",
    reference=lookup_backward,
    inputs=backward_inputs,
    check=check_backward,
    test_shapes=TEST_SHAPES,
    bench_shapes=BENCH_SHAPES,
    bytes_moved=lambda s, dtype: 4 * s["N"] * s["D"] * dtype.itemsize + 12 * s["N"],
    flops=lambda s: 4 * s["N"] * s["D"],
)
