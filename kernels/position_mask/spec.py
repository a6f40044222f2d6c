"""The mask over the next position, for tests and benchmarks."""

import torch
from torch import Tensor

from vqfast.kernels.pack.reference import pack
from vqfast.kernels.pack.spec import random_grains
from vqfast.kernels.position_mask.reference import position_mask
from vqfast.kernels.spec import Shape, Spec, generator


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple:
    """Images drawn so far each to a point of its own, from nothing to everything, with special tokens between."""
    B, H, W, G = shape["B"], shape["H"], shape["W"], shape["G"]
    g = generator(device, seed)
    grains, factor = random_grains(shape, device, seed + 1), 2 ** (G - 1)
    grid = torch.zeros(B, H * factor, W * factor, dtype=torch.int64, device=device)
    per_image = H * W * factor**2
    L = per_image + 3
    positions = torch.full((B, L), -1, device=device)
    grain_ids, grain = torch.full((B, L), -1, device=device), torch.zeros(B, dtype=torch.int64, device=device)
    for b in range(B):
        _, cu_seqlens, position, grain_id = pack(grid[b : b + 1], grains[b : b + 1], False, per_image)
        drawn = int(cu_seqlens[1]) * b // max(B - 1, 1)
        # The last image is whole; every third has ended its grain.
        positions[b, 1 : drawn + 1], grain_ids[b, 1 : drawn + 1] = position[:drawn], grain_id[:drawn]
        if drawn:
            grain[b] = grain_id[drawn - 1]
        positions[b, 0], grain_ids[b, 0] = H * W + 2, 0
        if b % 3 == 2:
            positions[b, drawn + 1], grain_ids[b, drawn + 1] = H * W * 4 ** int(grain[b]) + 1, grain[b]
    order = torch.randperm(L, generator=g, device=device)
    vocab_size = per_image + 3 + shape.get("more", 0)
    return positions[:, order], grain_ids[:, order], grain, H, W, G, vocab_size


def check(got: Tensor, args: tuple) -> None:
    want = position_mask(*args)
    if got.dtype != torch.bool or got.shape != want.shape:
        raise AssertionError(f"position_mask: {got.dtype} {tuple(got.shape)}, expected bool {tuple(want.shape)}")
    if not torch.equal(got, want):
        b, p = (got != want).nonzero()[0].tolist()
        raise AssertionError(f"position_mask: image {b}, entry {p} is {bool(got[b, p])}")


SPEC = Spec(
    op="position_mask",
    reference=position_mask,
    inputs=inputs,
    check=check,
    test_shapes=(
        dict(B=7, H=4, W=4, G=2),
        dict(B=1, H=1, W=1, G=1),
        dict(B=0, H=2, W=3, G=2),
        dict(B=7, H=3, W=2, G=3, more=40),
        dict(B=3, H=6, W=5, G=2),
        dict(B=4, H=1, W=1, G=4),
    ),
    bench_shapes=(dict(B=50, H=16, W=16, G=2),),
    bytes_moved=lambda s, dtype: s["B"] * s["H"] * s["W"] * 4 ** (s["G"] - 1) * (1 + 16),
    flops=lambda s: 0,
    dtypes=(torch.int64,),
)
