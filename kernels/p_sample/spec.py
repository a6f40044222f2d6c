"""Reverse step for tests and benchmarks."""

import torch
from torch import Tensor

from vqfast.kernels.diffusion_loss.spec import noised
from vqfast.kernels.p_sample.reference import p_sample
from vqfast.kernels.q_sample.spec import random_key
from vqfast.kernels.spec import Shape, Spec, generator


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    """Where `known` is set, every third token is given; where `guidance` is, there are unconditional logits."""
    x0, x_t, t, s, levels, noise = noised(shape, device, seed)
    g = generator(device, seed + 1)
    logits = torch.randn(*x0.shape, shape["K"], generator=g, device=device) * shape.get("sharpness", 2.0)
    known = unconditional = None
    if shape.get("known"):
        known = torch.where(torch.arange(x0.shape[1], device=device) % 3 == 0, x0, -1)
    if shape.get("guidance"):
        unconditional = (logits + torch.randn(logits.shape, generator=g, device=device)).to(dtype)
    return (
        logits.to(dtype), unconditional, x_t, t, s, levels, noise, known, shape.get("marginal", False),
        shape.get("temperature", 1.0), shape.get("guidance", 1.0), shape.get("top_k", 0), shape.get("top_p", 1.0),
        random_key(device, seed),
    )  # fmt: skip


def check(got: Tensor, args: tuple) -> None:
    """The same tokens, but for the few whose draw falls within rounding of a boundary between two codes."""
    want = p_sample(*args)
    states = args[0].shape[-1] + args[5].shape[1] - 1
    wrong = int((got != want).sum())
    if got.shape != want.shape or bool(((got < 0) | (got >= states)).any()) or wrong > 1 + want.numel() // 1000:
        raise AssertionError(f"p_sample: {wrong} of {want.numel()} tokens differ from the reference")


SPEC = Spec(
    op="p_sample",
    reference=p_sample,
    inputs=inputs,
    check=check,
    test_shapes=(
        dict(B=3, L=16, K=32, T=10),
        dict(B=2, L=1, K=1, T=1),
        dict(B=0, L=4, K=3, T=5),
        dict(B=3, L=50, K=123, T=100, known=True),
        dict(B=4, L=33, K=1025, T=1000, step=50, temperature=0.7),
        dict(B=2, L=20, K=4100, T=100, step=100, sharpness=8.0, known=True),
        dict(B=3, L=50, K=123, T=10, family="absorbing", known=True),
        dict(B=3, L=50, K=64, T=10, step=4, family="absorbing", top_k=9, guidance=2.0),
        dict(B=3, L=50, K=123, T=10, step=3, family="mask_and_replace", marginal=True, known=True),
        dict(B=3, L=50, K=40, T=10, step=10, family="mask_and_replace", top_p=0.8),
        dict(B=3, L=50, K=123, T=10, step=2, family="marginal", marginal=True, known=True),
        dict(B=3, L=10, K=1025, T=10, step=5, family="marginal", top_k=40, top_p=0.9, temperature=1.3),
        dict(B=3, L=50, K=77, T=10, step=5, marginal=True, guidance=1.5),
    ),
    bench_shapes=(dict(B=32, L=256, K=1024, T=1000, step=10),),
    bytes_moved=lambda s, dtype: s["B"] * s["L"] * (s["K"] * dtype.itemsize + 16),
    flops=lambda s: 10 * s["B"] * s["L"] * s["K"],
)
