"""One process of a distributed VectorQuantize; started by test_processes.py with folder, rank and world size.

The test itself runs the cases as rank 0 of 1, without torch.distributed: on the joined batch.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vqfast.nn import VectorQuantize, accumulate_codebooks
from vqfast.nn.codebook import afkmc2, kmeans

HEADS = dict(heads=2, codebook_dim=4, separate_codebook_per_head=True)
MOVED = {
    "plain": dict(),
    "heads": HEADS,
    "cosine": dict(use_cosine_sim=True),
    "cosine heads": HEADS | dict(use_cosine_sim=True),
    "learnable": dict(decay=None),
    "masks and weights": HEADS,
    "accumulated": HEADS,
    "alone": dict(sync_codebook=False),
}
REVIVED = {"revival": dict(), "revival of cosine heads": HEADS | dict(use_cosine_sim=True)}
STARTED = {"random": dict(), "afkmc2": dict(kmeans_start="afkmc2")}
SIZES = (20, 30)  # vectors of each rank: not the same number


def share(joined: Tensor, rank: int, world: int) -> Tensor:
    return joined if world == 1 else joined.split(SIZES)[rank]


def clusters() -> Tensor:
    """50 vectors in 8 tight clusters, each of which has vectors in both shares."""
    generator = torch.Generator().manual_seed(5)
    centres = 100 * torch.randn(8, 8, generator=generator)
    return centres[torch.arange(50) % 8] + 0.1 * torch.randn(50, 8, generator=generator)


def with_codes(options: dict[str, Any]) -> VectorQuantize:
    vq = VectorQuantize(8, 16, **{"decay": 0.5} | options)
    codes = torch.randn(vq.codebook.shape)
    if vq.use_cosine_sim:
        codes = F.normalize(codes, dim=-1)
    vq.load_state_dict({"codebook": codes, "embed_avg": codes}, strict=False)
    return vq


def moved(name: str, rank: int, world: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    vq = with_codes(MOVED[name])
    for _ in range(3):
        x, mask, weights = torch.randn(50, 8), torch.rand(50) < 0.7, torch.rand(50)
        call = {"mask": mask, "weights": weights} if name == "masks and weights" else {}
        call = {key: share(value, rank, world) for key, value in call.items()}
        with accumulate_codebooks(vq) if name == "accumulated" else nullcontext():
            for part in share(x, rank, world).split(7 if name == "accumulated" else 50):
                vq(part, **call)
    return vq.state_dict()


def revived(name: str, rank: int, world: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    vq = with_codes(REVIVED[name] | dict(threshold_ema_dead_code=0.6))
    x = torch.randn(50, 8)
    torch.manual_seed(100 + rank)  # what a rank offers is its own
    vq(share(x, rank, world))
    return vq.state_dict() | {"x": x}


def started(name: str, rank: int, world: int) -> dict[str, Tensor]:
    torch.manual_seed(100 + rank)
    x = share(clusters(), rank, world)
    vq = VectorQuantize(8, 8, kmeans_init=True, **STARTED[name])
    vq(x)
    fixed = kmeans(x, 8, start=clusters()[:8] + 1, iters=3)
    return vq.state_dict() | {"seeds": afkmc2(x, 8), "fixed": fixed.centres, "fixed counts": fixed.counts}


CASES = {name: case for case, names in ((moved, MOVED), (revived, REVIVED), (started, STARTED)) for name in names}

if __name__ == "__main__":
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    all_reduce, calls = dist.all_reduce, []
    dist.all_reduce = lambda values: (calls.append(tuple(values.shape)), all_reduce(values))
    results = {}
    for name, case in CASES.items():
        calls.clear()
        results[name] = case(name, rank, world) | {"all-reduces": calls.copy()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
