"""Uniform forward noise for tests and benchmarks. Integer arithmetic: every backend gives the same tokens."""

import torch
from torch import Tensor

from vqfast.kernels.q_sample.reference import uniform_q_sample
from vqfast.kernels.spec import Shape, Spec, generator


def alpha_bar_table(T: int, device: torch.device | str) -> Tensor:
    """cos^2 from 1 down to almost 0 (T + 1 values): the shape of the published schedules."""
    level = torch.linspace(0, 1, T + 1, dtype=torch.float64, device=device)
    return torch.cos(level * (torch.pi / 2) * 0.999).square()


def random_key(device: torch.device | str, seed: int) -> Tensor:
    return torch.randint(1 << 62, (2,), generator=generator(device, seed + 1000), device=device)


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    g = generator(device, seed)
    B, L, K, T = shape["B"], shape["L"], shape["K"], shape["T"]
    x0 = torch.randint(K, (B, L), generator=g, device=device)
    t = torch.randint(0, T + 1, (B,), generator=g, device=device)
    return x0, t, alpha_bar_table(T, device), K, random_key(device, seed)


def check(got: Tensor, args: tuple) -> None:
    want = uniform_q_sample(*args)
    if not torch.equal(got, want):
        raise AssertionError(f"uniform_q_sample: {int((got != want).sum())} of {want.numel()} tokens differ")


SPEC = Spec(
    op="uniform_q_sample",
    reference=uniform_q_sample,
    inputs=inputs,
    check=check,
    test_shapes=(
        dict(B=3, L=16, K=32, T=10),
        dict(B=1, L=1, K=1, T=1),
        dict(B=0, L=4, K=3, T=5),
        dict(B=5, L=123, K=50257, T=1000),
    ),
    bench_shapes=(dict(B=32, L=256, K=1024, T=1000),),
    bytes_moved=lambda s, dtype: 16 * s["B"] * s["L"],
    flops=lambda s: 100 * s["B"] * s["L"],
    dtypes=(torch.int64,),
)
