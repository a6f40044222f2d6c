"""Reverse step through matrices, for tests and benchmarks."""

import torch
from torch import Tensor

from vqfast.kernels.matrix_loss.spec import step
from vqfast.kernels.matrix_sample.reference import matrix_sample
from vqfast.kernels.q_sample.spec import random_key
from vqfast.kernels.spec import Shape, Spec, generator


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    """Where `known` is set, every third token is given; where `guidance` is, there are unconditional logits."""
    x0, x_t, s, prior, likelihood = step(shape, device, seed)
    g = generator(device, seed + 1)
    logits = torch.randn(*x0.shape, shape["K"], generator=g, device=device) * shape.get("sharpness", 2.0)
    known = unconditional = None
    if shape.get("known"):
        known = torch.where(torch.arange(x0.shape[1], device=device) % 3 == 0, x0, -1)
    if shape.get("guidance"):
        unconditional = (logits + torch.randn(logits.shape, generator=g, device=device)).to(dtype)
    return (
        logits.to(dtype), unconditional, x_t, s, prior, likelihood, known, shape.get("marginal", False),
        shape.get("temperature", 1.0), shape.get("guidance", 1.0), shape.get("top_k", 0), shape.get("top_p", 1.0),
        random_key(device, seed),
    )  # fmt: skip


def check(got: Tensor, args: tuple) -> None:
    """The same tokens, but for the one whose draw falls within rounding of a boundary between two codes."""
    want = matrix_sample(*args)
    wrong = int((got != want).sum())
    if got.shape != want.shape or wrong > want.numel() // 1000:
        raise AssertionError(f"matrix_sample: {wrong} of {want.numel()} tokens differ from the reference")


SPEC = Spec(
    op="matrix_sample",
    reference=matrix_sample,
    inputs=inputs,
    check=check,
    test_shapes=(
        dict(B=3, L=16, K=32, T=6),
        dict(B=2, L=1, K=1, T=2),
        dict(B=0, L=4, K=3, T=2),
        dict(B=3, L=50, K=123, T=6, known=True),
        dict(B=3, L=37, K=65, T=6, step=3, banded=True, marginal=True, known=True, temperature=0.7),
        dict(B=2, L=40, K=256, T=4, banded=True, sharpness=8.0),
        dict(B=4, L=33, K=47, T=4, shared=True, step=2, top_k=9, guidance=2.0),
        dict(B=4, L=33, K=47, T=4, shared=True, step=4, marginal=True, top_p=0.8),
        dict(B=2, L=30, K=128, T=3, top_k=40, top_p=0.9, temperature=1.3),
    ),
    bench_shapes=(dict(B=32, L=256, K=256, T=16, banded=True, shared=True),),
    bytes_moved=lambda s, dtype: s["B"] * s["L"] * (s["K"] * dtype.itemsize + 16) + 16 * s["K"] ** 2,
    flops=lambda s: 2 * s["B"] * s["L"] * s["K"] ** 2,
)
