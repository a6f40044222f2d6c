"""One process of a distributed ResidualVQ; started by test_residual_vq.py with folder, rank and world size."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from vqfast.nn import ResidualVQ

folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
torch.manual_seed(0)
vq = ResidualVQ(dim=4, num_quantizers=4, codebook_size=16, quantize_dropout=True)
torch.manual_seed(100 + rank)
kept = []
for _ in range(12):
    indices = vq(torch.randn(20 + 10 * rank, 4))[1]
    kept.append(int((indices[0] >= 0).sum()))
torch.save(vq.state_dict() | {"kept": torch.tensor(kept)}, folder / f"{rank}.pt")
dist.destroy_process_group()
