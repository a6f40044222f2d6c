"""Rows through chains of matrices, for tests and benchmarks."""

import torch
from torch import Tensor

from vqfast.kernels.spec import Shape, Spec, assert_close, generator, in_float64
from vqfast.kernels.transition_matmul.library import products_ahead
from vqfast.kernels.transition_matmul.reference import transition_matmul

# Sums of products of numbers that are not negative: the relative error of up to T products of K terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def chain(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple[Tensor, Tensor | None]:
    """steps and diagonal: dense steps near the identity, or with `banded` a symmetric band."""
    g = generator(device, seed)
    K, T = shape["K"], shape["T"]
    if not shape.get("banded"):
        noise = torch.rand(T, K, K, generator=g, device=device, dtype=torch.float64)
        steps = 0.8 * torch.eye(K, dtype=torch.float64, device=device) + 0.2 * noise / noise.sum(2, keepdim=True)
        return steps.to(dtype), None
    distance = torch.arange(K, device=device, dtype=torch.float64)
    width = torch.rand(T, 1, generator=g, device=device, dtype=torch.float64) * 2 + 0.2
    weight = (-(distance / width).square()).exp() / 8
    weight[:, 0] = 0
    reach = weight.cumsum(1)
    return weight.to(dtype), (1 - reach - reach.flip(1)).to(dtype)


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    """Levels spread over the chain, the first sample at t = T; `codes`: one-hot rows; `from_data` = False: s above 0;
    `span`: steps of that many levels."""
    g = generator(device, seed + 1)
    B, L, K, T = shape["B"], shape["L"], shape["K"], shape["T"]
    tables = chain(shape, torch.promote_types(dtype, torch.float32), device, seed)
    stride = shape.get("stride", 3)
    t = torch.randint(0, T + 1, (B,), generator=g, device=device)
    t[:1] = T
    span = shape.get("span", 0)
    if span:
        t = t.clamp(min=span)
        s = t - span
    else:
        s = None if shape.get("from_data", True) else (t * torch.rand(B, generator=g, device=device)).long()
    if shape.get("codes"):
        rows = torch.randint(K, (B, L), generator=g, device=device)
    else:
        rows = torch.rand(B, L, K, generator=g, device=device).to(dtype)
    return rows, s, t, *tables, *products_ahead(*tables, stride), stride, shape.get("transpose", False), span


def check(got: Tensor, args: tuple) -> None:
    tolerance = TOLERANCE[args[3].dtype]
    want = transition_matmul(*in_float64(args))
    assert_close(got, want, rtol=tolerance, atol=tolerance * 1e-3, what="transition_matmul")


SPEC = Spec(
    op="transition_matmul",
    reference=transition_matmul,
    inputs=inputs,
    check=check,
    test_shapes=(
        dict(B=3, L=16, K=32, T=10),
        dict(B=2, L=1, K=1, T=1, stride=1),
        dict(B=0, L=4, K=3, T=5),
        dict(B=4, L=5, K=123, T=20, transpose=True),
        dict(B=6, L=33, K=65, T=30, banded=True, stride=4, from_data=False),
        dict(B=4, L=9, K=31, T=30, banded=True, codes=True, stride=7),
        dict(B=5, L=9, K=31, T=25, codes=True, transpose=True, from_data=False, stride=4),
        dict(B=5, L=9, K=31, T=25, codes=True, transpose=True, span=1, stride=4),
        dict(B=5, L=9, K=17, T=9, from_data=False, transpose=True, stride=9),
        dict(B=5, L=9, K=17, T=9, span=9, stride=2),
    ),
    bench_shapes=(dict(B=32, L=256, K=256, T=1000, banded=True, stride=31),),
    bytes_moved=lambda s, dtype: 2 * s["B"] * s["L"] * s["K"] * dtype.itemsize,
    # From the data to levels spread over the chain: the product made ahead and half of the steps after it.
    flops=lambda s: s["B"] * s["L"] * s["K"] ** 2 * (1 + s.get("stride", 3)),
)
