"""Loss of a step through matrices, with its gradient, for tests and benchmarks."""

import torch
from torch import Tensor

from vqfast.kernels.matrix_loss.reference import matrix_loss, matrix_loss_grad, rows_of
from vqfast.kernels.matrix_sample.reference import draw
from vqfast.kernels.spec import Shape, Spec, assert_close, generator
from vqfast.kernels.transition_matmul.library import by_batches, products_ahead
from vqfast.kernels.transition_matmul.spec import chain

# A KL is a difference of logarithms of up to 700, in float64 whatever the logits are; the results are rounded.
LOSS_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-7, torch.bfloat16: 2e-7, torch.float16: 2e-7}
GRAD_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def step(shape: Shape, device: torch.device | str, seed: int) -> tuple[Tensor, ...]:
    """x0, x_t, s, prior, likelihood of steps of `step` levels (default 1), the first sample at s = 0.

    `shared`: all samples at one level, their matrices one.
    """
    g = generator(device, seed)
    B, L, K, T = shape["B"], shape["L"], shape["K"], shape["T"]
    tables = chain(shape, torch.float64, device, seed)
    ahead = *tables, *products_ahead(*tables, 2)
    t = torch.randint(1, T + 1, (B,), generator=g, device=device)
    t[:1] = 1
    if shape.get("shared"):
        t[:] = T
    s = (t - shape.get("step", 1)).clamp(min=0)
    codes = torch.arange(K, device=device).expand(B, K)
    prior = by_batches(codes, None, s, *ahead, 2, False, 0)
    likelihood = by_batches(codes, s, t, *ahead, 2, True, 0)
    x0 = torch.randint(K, (B, L), generator=g, device=device)
    noised = rows_of(by_batches(codes, None, t, *ahead, 2, False, 0), x0)
    x_t = draw(noised, torch.rand(B, L, generator=g, device=device, dtype=torch.float64))
    if shape.get("shared"):
        prior, likelihood = (matrix[:1].expand(B, K, K) for matrix in (prior, likelihood))
    return x0, x_t, s, prior, likelihood


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    """Gaussian logits times `sharpness` (default 2). Every seventh token does not count."""
    x0, x_t, s, prior, likelihood = step(shape, device, seed)
    g = generator(device, seed + 1)
    logits = torch.randn(*x0.shape, shape["K"], generator=g, device=device) * shape.get("sharpness", 2.0)
    scale = torch.rand(x0.shape, generator=g, device=device, dtype=torch.float64) + 0.5
    scale.view(-1)[6::7] = 0
    marginal, aux_weight = shape.get("marginal", False), shape.get("aux_weight", 0.0)
    return logits.to(dtype), x0, x_t, s, prior, likelihood, scale, marginal, aux_weight, True


def check(got: tuple[Tensor, Tensor], args: tuple) -> None:
    logits, x0, x_t, s, prior, likelihood, scale, marginal, aux_weight, with_grad = args
    defined = (logits, x0, x_t, s, prior, likelihood, marginal, aux_weight)
    counts = scale != 0
    tolerance = LOSS_TOLERANCE[logits.dtype]
    want = matrix_loss(*defined).where(counts, 0)
    assert_close(got[0], want, rtol=tolerance, atol=1e-12, what="matrix_loss: loss")
    if with_grad:
        tolerance = GRAD_TOLERANCE[logits.dtype]
        want = (matrix_loss_grad(*defined) * scale[..., None]).where(counts[..., None], 0)
        # The smallest subnormal half is 6e-8.
        smallest = 3e-8 if logits.dtype == torch.float16 else 1e-12
        assert_close(got[1], want, rtol=tolerance, atol=smallest, what="matrix_loss: gradient")


TEST_SHAPES = (
    dict(B=3, L=16, K=32, T=6),
    dict(B=2, L=1, K=1, T=2),
    dict(B=0, L=4, K=3, T=2),
    dict(B=3, L=21, K=123, T=6, aux_weight=0.1),
    dict(B=3, L=37, K=65, T=6, step=3, banded=True, marginal=True, aux_weight=0.01),
    dict(B=2, L=40, K=256, T=4, banded=True, sharpness=8.0),
    dict(B=4, L=9, K=47, T=4, shared=True, step=2),
    dict(B=4, L=9, K=47, T=4, shared=True, step=4, marginal=True, sharpness=30.0),
    dict(B=2, L=3, K=250, T=3, marginal=True),
)

SPEC = Spec(
    op="matrix_loss",
    reference=matrix_loss,
    inputs=inputs,
    check=check,
    test_shapes=TEST_SHAPES,
    bench_shapes=(dict(B=32, L=256, K=256, T=16, banded=True),),
    # Logits and their gradient, two matrices a sample.
    bytes_moved=lambda s, dtype: 2 * s["B"] * s["L"] * s["K"] * dtype.itemsize + 16 * s["B"] * s["K"] ** 2,
    # A product forward, its transpose backward.
    flops=lambda s: 4 * s["B"] * s["L"] * s["K"] ** 2,
)
