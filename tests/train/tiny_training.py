"""Trainings of a second or two, one for each model; also a script: one process of a training.

    tiny_training.py FOLDER MODEL [SETTING=VALUE ...]

trains in FOLDER/run, which must be there, and leaves the state dict of this process in FOLDER/RANK.npz.
"""

import ast
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from vqfast.data import CodeBatches, ImageBatches
from vqfast.data.images import ImageData
from vqfast.models.vqddm import VQDDM, VQDDMConfig
from vqfast.models.vqvae import VQVAE, VQVAEConfig
from vqfast.train import TrainConfig, train


class Images(Dataset):
    """(N, C, side, side) images of noise; positions to batches, as vqfast.data gives them."""

    def __init__(self, count: int, side: int, channels: int):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
        self._batches = ImageBatches(ImageData("noise", pixels, np.arange(count, dtype=np.uint32)), "all")

    def __len__(self):
        return len(self._batches)

    def __getitem__(self, positions):
        return self._batches[positions]


def images() -> Dataset:
    return Images(30, 4, 1)


def codes() -> Dataset:
    numbers = torch.Generator().manual_seed(0)
    return CodeBatches(torch.randint(8, (30, 4, 4), generator=numbers), torch.randint(2, (30,), generator=numbers))


def vqvae(**changes) -> VQVAE:
    sizes = dict(image_size=4, in_channels=1, channels=32, mults=(1,), num_res_blocks=1, codebook_size=8, code_dim=4)
    model = VQVAE(VQVAEConfig(**sizes | dict(dropout=0.1) | changes))
    # A k-means start is over the first batch of every process at once, which one process of several batches never sees.
    model.quantizer.load_state_dict(model.quantizer.state_dict() | {"initialised": torch.tensor(True)})
    return model


def vqddm(**changes) -> VQDDM:
    sizes = dict(codebook_size=8, grid=(4, 4), denoiser="transformer", dim=16, depth=2, heads=2, T=4, num_classes=2)
    return VQDDM(VQDDMConfig(**sizes | changes))


# kind -> (model, what it trains on): a model joins every test of the trainer by a line here.
TINY: dict[str, tuple[Callable[[], nn.Module], Callable[[], Dataset]]] = {
    "vqvae": (vqvae, images),
    "vqddm": (vqddm, codes),
}

SETTINGS = dict(
    steps=20,
    batch_size=2,
    lr=1e-3,
    warmup=2,
    log_every=1,
    eval_every=0,
    save_every=1000,
    tensorboard=False,
    device="cpu",
)


def train_tiny(kind: str, run: Path, *, resume: bool = False, held_out: bool = False, **settings) -> nn.Module:
    """Train the tiny model of a kind in a run's folder, from weights that are the same every time."""
    make, data = TINY[kind]
    torch.manual_seed(0)
    dataset = data()
    config = TrainConfig(**SETTINGS | settings)
    return train(make(), dataset, config, run, held_out=dataset if held_out else None, resume=resume)


if __name__ == "__main__":
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    settings = {}
    for name, value in (argument.split("=") for argument in sys.argv[3:]):
        try:
            settings[name] = ast.literal_eval(value)
        except ValueError:
            settings[name] = value
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    if settings.pop("dies", None) == int(rank):
        make, data = TINY[kind]
        broken = make()
        whole = type(broken).training_step

        def training_step(self, batch, step):
            if step == 3:
                raise RuntimeError("this process breaks on purpose")
            return whole(self, batch, step)

        type(broken).training_step = training_step
    trained = train_tiny(kind, folder / "run", **settings)
    from vqfast.train.processes import whole as gathered

    state = {name: gathered(value.detach()).numpy() for name, value in trained.state_dict().items()}
    np.savez(folder / f"{rank}.npz", **state)
