"""Diffusion loss with its gradient, for tests and benchmarks; and the row scaling of its backward pass."""

import torch
from torch import Tensor

from vqfast.kernels.diffusion_loss.reference import diffusion_loss, diffusion_loss_grad
from vqfast.kernels.q_sample.reference import q_sample
from vqfast.kernels.q_sample.spec import family_tables, random_key
from vqfast.kernels.spec import Shape, Spec, assert_close, generator

# The KL of a step is a small difference of terms of order 1: in float32 its error is absolute.
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def noised(shape: Shape, device: torch.device | str, seed: int) -> tuple:
    """x0, x_t, t, s, levels, noise: `step` levels a step (default 1), the first sample at t = 1 and the last at t = T;
    of the `family` that the shape names (default "uniform").
    """
    g = generator(device, seed)
    B, L, K, T = shape["B"], shape["L"], shape["K"], shape["T"]
    x0 = torch.randint(K, (B, L), generator=g, device=device)
    t = torch.randint(1, T + 1, (B,), generator=g, device=device)
    t[:1], t[1:][-1:] = 1, T
    s = (t - shape.get("step", 1)).clamp(min=0)
    tables = family_tables(shape.get("family", "uniform"), K, T, device)
    return x0, q_sample(x0, t, *tables, K, random_key(device, seed)), t, s, *tables


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    """Gaussian logits times `sharpness` (default 2). Every seventh token does not count."""
    x0, x_t, t, s, levels, noise = noised(shape, device, seed)
    g = generator(device, seed + 1)
    logits = torch.randn(*x0.shape, shape["K"], generator=g, device=device) * shape.get("sharpness", 2.0)
    scale = torch.rand(x0.shape, generator=g, device=device, dtype=torch.float64) + 0.5
    scale.view(-1)[6::7] = 0
    marginal, aux_weight = shape.get("marginal", False), shape.get("aux_weight", 0.0)
    return logits.to(dtype), x0, x_t, t, s, levels, noise, scale, marginal, aux_weight, True


def check(got: tuple[Tensor, Tensor], args: tuple) -> None:
    logits, x0, x_t, t, s, levels, noise, scale, marginal, aux_weight, with_grad = args
    wide = (logits.double(), x0, x_t, t, s, levels, noise, marginal, aux_weight)
    counts = scale != 0
    want = diffusion_loss(*wide).where(counts, 0)
    tolerance = LOSS_TOLERANCE[logits.dtype]
    assert_close(got[0], want, rtol=tolerance, atol=tolerance, what="diffusion_loss: loss")
    if with_grad:
        want = (diffusion_loss_grad(*wide) * scale[..., None]).where(counts[..., None], 0)
        tolerance = GRAD_TOLERANCE[logits.dtype]
        assert_close(
            got[1],
            want,
            rtol=tolerance,
            atol=2e-6 if tolerance > 1e-6 else tolerance,
            what="diffusion_loss: gradient",
        )


TEST_SHAPES = (
    dict(B=3, L=16, K=32, T=10),
    dict(B=2, L=1, K=1, T=1),
    dict(B=0, L=4, K=3, T=5),
    dict(B=3, L=5, K=123, T=100, aux_weight=0.1),
    dict(B=4, L=7, K=1025, T=1000, step=50),
    dict(B=2, L=3, K=2, T=4000, sharpness=30.0),
    dict(B=2, L=6, K=4100, T=100, step=100, sharpness=8.0, aux_weight=0.001),
    dict(B=3, L=9, K=123, T=10, family="absorbing"),
    dict(B=2, L=9, K=33, T=10, step=4, family="absorbing", aux_weight=0.1, marginal=True),
    dict(B=4, L=9, K=77, T=100, family="mask_and_replace", aux_weight=0.01),
    dict(B=4, L=9, K=1025, T=100, step=30, family="mask_and_replace", marginal=True, aux_weight=0.01),
    dict(B=4, L=9, K=123, T=100, marginal=True),
    dict(B=4, L=9, K=123, T=100, family="marginal"),
    dict(B=4, L=9, K=40, T=10, step=3, family="marginal", marginal=True, aux_weight=0.01),
)

SPEC = Spec(
    op="diffusion_loss",
    reference=diffusion_loss,
    inputs=inputs,
    check=check,
    test_shapes=TEST_SHAPES,
    bench_shapes=(dict(B=32, L=256, K=1024, T=1000),),
    bytes_moved=lambda s, dtype: 2 * s["B"] * s["L"] * s["K"] * dtype.itemsize,
    flops=lambda s: 20 * s["B"] * s["L"] * s["K"],
)
