"""Forward noise for tests and benchmarks. Integer arithmetic: every backend gives the same tokens."""

import torch
from torch import Tensor

from vqfast.kernels.q_sample.reference import q_sample
from vqfast.kernels.spec import Shape, Spec, generator


def alpha_bar_table(T: int, device: torch.device | str) -> Tensor:
    """cos^2 from 1 down to almost 0 (T + 1 values): the shape of the published schedules."""
    level = torch.linspace(0, 1, T + 1, dtype=torch.float64, device=device)
    return torch.cos(level * (torch.pi / 2) * 0.999).square()


def family_tables(family: str, K: int, T: int, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    """levels and noise of a family, as the ops take them; every other code of "marginal" is a thousand times rarer."""
    alpha = alpha_bar_table(T, device)
    if family == "absorbing":
        return torch.stack([alpha, 1 - alpha], dim=1), None
    if family == "mask_and_replace":
        return torch.stack([alpha, 0.7 * (1 - alpha)], dim=1), None
    if family == "marginal":
        unit = 2.0**53
        weight = torch.where(torch.arange(K, device=device) % 2 == 0, 1.0, 1e-3).double()
        cumulative = (weight.cumsum(0) / weight.sum() * unit).round()
        return alpha[:, None], torch.diff(cumulative, prepend=cumulative.new_zeros(1)) / unit
    return alpha[:, None], None


def random_key(device: torch.device | str, seed: int) -> Tensor:
    return torch.randint(1 << 62, (2,), generator=generator(device, seed + 1000), device=device)


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    g = generator(device, seed)
    B, L, K, T = shape["B"], shape["L"], shape["K"], shape["T"]
    x0 = torch.randint(K, (B, L), generator=g, device=device)
    t = torch.randint(0, T + 1, (B,), generator=g, device=device)
    return x0, t, *family_tables(shape.get("family", "uniform"), K, T, device), K, random_key(device, seed)


def check(got: Tensor, args: tuple) -> None:
    want = q_sample(*args)
    if not torch.equal(got, want):
        raise AssertionError(f"q_sample: {int((got != want).sum())} of {want.numel()} tokens differ")


SPEC = Spec(
    op="q_sample",
    reference=q_sample,
    inputs=inputs,
    check=check,
    test_shapes=(
        dict(B=3, L=16, K=32, T=10),
        dict(B=1, L=1, K=1, T=1),
        dict(B=0, L=4, K=3, T=5),
        dict(B=5, L=123, K=50257, T=1000),
        dict(B=3, L=50, K=123, T=10, family="absorbing"),
        dict(B=3, L=50, K=2, T=100, family="mask_and_replace"),
        dict(B=5, L=123, K=1024, T=10, family="marginal"),
    ),
    bench_shapes=(dict(B=32, L=256, K=1024, T=1000),),
    bytes_moved=lambda s, dtype: 16 * s["B"] * s["L"],
    flops=lambda s: 100 * s["B"] * s["L"],
    dtypes=(torch.int64,),
)
