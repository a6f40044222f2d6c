"""The posterior of a step, for tests and benchmarks."""

import torch
from torch import Tensor

from vqfast.kernels.diffusion_loss.spec import noised
from vqfast.kernels.posterior.reference import posterior, posterior_backward
from vqfast.kernels.spec import Shape, Spec, assert_close, generator

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    x0, x_t, t, s, levels, noise = noised(shape, device, seed)
    g = generator(device, seed + 1)
    logits = torch.randn(*x0.shape, shape["K"], generator=g, device=device) * 2
    return logits.to(dtype), x_t, t, s, levels, noise, shape.get("marginal", False)


def check(got: Tensor, args: tuple) -> None:
    logits, *rest = args
    tolerance = TOLERANCE[logits.dtype]
    assert_close(got, posterior(logits.double(), *rest), rtol=tolerance, atol=tolerance, what="posterior")


def backward_inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    logits, *rest = inputs(shape, dtype, device, seed)
    width = shape["K"] + rest[3].shape[1] - 1
    grad = torch.randn(*logits.shape[:2], width, generator=generator(device, seed + 2), device=device)
    return grad.to(dtype), logits, *rest


def check_backward(got: Tensor, args: tuple) -> None:
    grad, logits, *rest = args
    tolerance = TOLERANCE[logits.dtype]
    want = posterior_backward(grad.double(), logits.double(), *rest)
    # Sums over a row of gradients of size 1.
    assert_close(got, want, rtol=tolerance, atol=4 * tolerance, what="posterior_backward")


TEST_SHAPES = (
    dict(B=3, L=16, K=32, T=10),
    dict(B=2, L=1, K=1, T=1),
    dict(B=0, L=4, K=3, T=5),
    dict(B=3, L=5, K=123, T=10, family="absorbing"),
    dict(B=3, L=5, K=123, T=10, step=3, family="mask_and_replace", marginal=True),
    dict(B=3, L=5, K=123, T=10, step=3, family="marginal", marginal=True),
    dict(B=3, L=7, K=200, T=10, step=10, marginal=True),
)

SPEC = Spec(
    op="posterior",
    reference=posterior,
    inputs=inputs,
    check=check,
    test_shapes=TEST_SHAPES,
    bench_shapes=(dict(B=32, L=256, K=1024, T=1000),),
    bytes_moved=lambda s, dtype: 2 * s["B"] * s["L"] * s["K"] * dtype.itemsize,
    flops=lambda s: 20 * s["B"] * s["L"] * s["K"],
)

BACKWARD_SPEC = Spec(
    op="posterior_backward",
    reference=posterior_backward,
    inputs=backward_inputs,
    check=check_backward,
    test_shapes=TEST_SHAPES,
    bench_shapes=SPEC.bench_shapes,
    bytes_moved=lambda s, dtype: 3 * s["B"] * s["L"] * s["K"] * dtype.itemsize,
    flops=lambda s: 20 * s["B"] * s["L"] * s["K"],
)
