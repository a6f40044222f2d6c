"""One process of a distributed VectorQuantize; started by test_vector_quantize.py with folder, rank and world size."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from vqfast.nn import VectorQuantize

folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
torch.manual_seed(0)
vq = VectorQuantize(4, 16, decay=0.5, threshold_ema_dead_code=1.0, kmeans_init=True)
torch.manual_seed(100 + rank)
for _ in range(3):
    vq(torch.randn(20 + 10 * rank, 4))
torch.save(vq.state_dict(), folder / f"{rank}.pt")
dist.destroy_process_group()
