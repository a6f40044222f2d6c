"""Codebook lookup on the fine grid and its backward, for tests and benchmarks."""

import torch
from torch import Tensor

from vqfast.kernels.dynamic_lookup.reference import dynamic_lookup, dynamic_lookup_backward
from vqfast.kernels.lookup.spec import TOLERANCE
from vqfast.kernels.pack.spec import random_grains, tokens_of
from vqfast.kernels.spec import Shape, Spec, assert_close, generator, in_float64


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    """`channels`: features whose dimension D lies before the others in memory."""
    g = generator(device, seed)
    B, D, factor = shape["B"], shape["D"], 2 ** (shape["G"] - 1)
    grains = random_grains(shape, device, seed + 1)
    channels = torch.randn(B, D, shape["H"] * factor, shape["W"] * factor, generator=g, device=device).to(dtype)
    features = channels.permute(0, 2, 3, 1)
    codebook = torch.randn(shape["K"], D, generator=g, device=device).to(dtype)
    indices = torch.randint(shape["K"], features.shape[:3], generator=g, device=device)
    for b, y, x in torch.cartesian_prod(*(torch.arange(n, device=device) for n in grains.shape)).tolist():
        edge = factor >> int(grains[b, y, x])
        cell = indices[b, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        cell.copy_(cell[::edge, ::edge].repeat_interleave(edge, 0).repeat_interleave(edge, 1))
    features = features if shape.get("channels") else features.contiguous()
    return features, codebook, indices, grains, shape["G"]


def check(got: tuple[Tensor, Tensor, Tensor], args: tuple) -> None:
    quantized, error, counts = got
    want_quantized, want_error, want_counts = dynamic_lookup(*in_float64(args))
    if quantized.dtype != args[0].dtype or not torch.equal(quantized.double(), want_quantized):
        raise AssertionError("dynamic_lookup: quantized is not the codes themselves")
    accumulate = 1e-12 if args[0].dtype == torch.float64 else 2e-6
    assert_close(error, want_error, rtol=accumulate, atol=accumulate, what="dynamic_lookup: squared_error")
    if not torch.equal(counts, want_counts):
        raise AssertionError(f"dynamic_lookup: counts {counts.tolist()}, expected {want_counts.tolist()}")


def backward_inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    features, *rest = inputs(shape, dtype, device, seed)
    g = generator(device, seed + 2)
    grad_quantized = torch.randn(features.shape, generator=g, device=device).to(dtype)
    grad_error = torch.randn(features.shape[:3], generator=g, device=device)
    return grad_quantized, grad_error.to(torch.promote_types(dtype, torch.float32)), features, *rest


def check_backward(got: Tensor, args: tuple) -> None:
    want = dynamic_lookup_backward(*in_float64(args))
    # The sum over a square is rounded to the dtype of the gradient before the rest is added.
    tolerance = TOLERANCE[args[2].dtype]
    assert_close(got, want, rtol=tolerance, atol=4 * tolerance, what="dynamic_lookup_backward")


TEST_SHAPES = (
    dict(B=3, H=4, W=4, G=2, K=32, D=16),
    dict(B=1, H=1, W=1, G=1, K=1, D=1),
    dict(B=0, H=2, W=3, G=2, K=5, D=3),
    dict(B=2, H=5, W=3, G=3, K=7, D=65),
    dict(B=2, H=3, W=2, G=4, K=50, D=5, channels=True),
    dict(B=2, H=6, W=5, G=2, K=300, D=130, channels=True),
)
BENCH_SHAPES = (dict(B=8, H=16, W=16, G=2, K=1024, D=256),)


def _row_bytes(s: Shape, dtype: torch.dtype) -> int:
    return tokens_of(s) * s["D"] * dtype.itemsize


SPEC = Spec(
    op="dynamic_lookup",
    reference=dynamic_lookup,
    inputs=inputs,
    check=check,
    test_shapes=TEST_SHAPES,
    bench_shapes=BENCH_SHAPES,
    bytes_moved=lambda s, dtype: 2 * _row_bytes(s, dtype) + 12 * tokens_of(s) + 8 * s["K"],
    flops=lambda s: 3 * tokens_of(s) * s["D"],
)

BACKWARD_SPEC = Spec(
    op="dynamic_lookup_backward",
    reference=dynamic_lookup_backward,
    inputs=backward_inputs,
    check=check_backward,
    test_shapes=TEST_SHAPES,
    bench_shapes=BENCH_SHAPES,
    bytes_moved=lambda s, dtype: 3 * _row_bytes(s, dtype) + 12 * tokens_of(s),
    flops=lambda s: 4 * tokens_of(s) * s["D"],
)
