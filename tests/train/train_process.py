"""One process of a distributed training; started by test_trainer.py with the folder, which holds an empty run."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from vqfast.data import ImageBatches, open_dataset
from vqfast.models.vqvae import VQVAE, VQVAEConfig
from vqfast.train import TrainConfig, train

folder = Path(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(int(os.environ["RANK"]))
model = VQVAE(VQVAEConfig(image_size=4, in_channels=1, channels=32, mults=(1,), num_res_blocks=1, codebook_size=8))
config = TrainConfig(steps=6, batch_size=4, save_every=3, log_every=2, eval_every=3, device="cpu")
data = open_dataset(folder / "images.npz")
trained = train(model, ImageBatches(data), config, folder / "run", held_out=ImageBatches(data, "held-out"))
np.savez(folder / f"{os.environ['RANK']}.npz", **{k: v.numpy() for k, v in trained.state_dict().items()})
