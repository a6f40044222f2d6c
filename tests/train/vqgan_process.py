"""One process of a distributed training of a VQGAN; started by test_vqgan_processes.py with the folder of a run."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from vqfast.data import ImageBatches, open_dataset
from vqfast.models.vqgan import VQGAN, VQGANConfig
from vqfast.train import TrainConfig, train

folder = Path(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
shape = dict(channels=32, mults=(1,), num_res_blocks=1, attention_resolutions=(), codebook_size=8, code_dim=4)
model = VQGAN(
    VQGANConfig(image_size=8, in_channels=1, z_channels=8, disc_channels=4, disc_layers=1, disc_start=1, **shape)
)
config = TrainConfig(
    steps=4, batch_size=4, save_every=4, log_every=1, device="cpu", tensorboard=False, precision="bf16"
)
data = open_dataset(folder / "images.npz")
trained = train(model, ImageBatches(data), config, folder / "run")
np.savez(folder / f"{os.environ['RANK']}.npz", **{name: p.detach().numpy() for name, p in trained.named_parameters()})
