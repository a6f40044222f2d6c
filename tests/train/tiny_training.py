"""Trainings of a second or two, one for each model; also a script: one process of a training.

    tiny_training.py FOLDER NAME [SETTING=VALUE ...]

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
from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.dqvae import DQVAE, DQVAEConfig
from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig
from vqfast.models.refit import collect_vectors, rebuild_codebook
from vqfast.models.registry import kind_of
from vqfast.models.vqddm import VQDDM, VQDDMConfig
from vqfast.models.vqgan import VQGAN, VQGANConfig
from vqfast.models.vqvae import VQVAE, VQVAEConfig
from vqfast.train import TrainConfig, create_run, train
from vqfast.train.processes import whole


def images(side: int = 4) -> Dataset:
    """Grey noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, side, side, 1), dtype=np.uint8)
    return ImageBatches(ImageData("noise", pixels, np.arange(30, dtype=np.uint32)), "all")


def patches(side: int = 4) -> Dataset:
    """2 x 2 patches an image, of which one image in five has none with much detail, the next has one, and so on."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 2 * side, 2 * side, 1), dtype=np.uint8)
    faint = rng.permuted(np.arange(4) >= np.arange(30)[:, None] % 5, axis=1).reshape(30, 2, 2, 1)
    faint = faint.repeat(side, 1).repeat(side, 2)
    pixels[faint] = 120 + pixels[faint] // 16  # not flat: norms would divide by what rounding leaves of a variance
    return ImageBatches(ImageData("patches", pixels, np.arange(30, dtype=np.uint32)), "all")


def codes() -> Dataset:
    numbers = torch.Generator().manual_seed(0)
    return CodeBatches(torch.randint(8, (30, 4, 4), generator=numbers), torch.randint(2, (30,), generator=numbers))


def dynamic_codes() -> Dataset:
    numbers = torch.Generator().manual_seed(0)
    grains = torch.randint(2, (30, 2, 2), generator=numbers)
    return CodeBatches(torch.randint(8, (30, 4, 4), generator=numbers), None, grains)


def vqvae(**changes) -> VQVAE:
    sizes = dict(image_size=4, in_channels=1, channels=32, mults=(1,), num_res_blocks=1, codebook_size=8, code_dim=4)
    model = VQVAE(VQVAEConfig(**sizes | dict(dropout=0.1) | changes))
    # A k-means start is over the first batch of every process at once, which one process of several batches never sees.
    model.quantizer.load_state_dict(model.quantizer.state_dict() | {"initialised": torch.tensor(True)})
    return model


def vqddm(**changes) -> VQDDM:
    sizes = dict(codebook_size=8, grid=(4, 4), denoiser="transformer", dim=16, depth=2, heads=2, T=4, num_classes=2)
    return VQDDM(VQDDMConfig(**sizes | changes))


def vqddm_unet() -> VQDDM:
    return vqddm(denoiser="unet", dim=32, mults=(1, 2))


JUDGED = dict(in_channels=1, channels=32, num_res_blocks=1, attention_resolutions=(), codebook_size=8, code_dim=4)
JUDGED |= dict(image_size=8, z_channels=32, disc_channels=4, disc_layers=1)


def vqgan(**changes) -> VQGAN:
    return VQGAN(VQGANConfig(**JUDGED | dict(mults=(1,)) | changes))


def dqvae(**changes) -> DQVAE:
    # Two channels a group: norms over the four values of one, some all but equal, magnify rounding a thousand times.
    return DQVAE(DQVAEConfig(**JUDGED | dict(mults=(1, 1, 1), channels=64, z_channels=64) | changes))


def dqvae_entropy() -> DQVAE:
    return dqvae(router="entropy")


def raster_gpt() -> RasterGPT:
    return RasterGPT(RasterGPTConfig(codebook_size=8, grid=(4, 4), dim=16, depth=2, heads=2, num_classes=2))


def dq_transformer(**changes) -> DQTransformer:
    sizes = dict(codebook_size=8, grid=(4, 4), dim=16, heads=2, position_depth=1, content_depth=1)
    return DQTransformer(DQTransformerConfig(**sizes | changes))


def refit(model: nn.Module, data: Dataset) -> nn.Module:
    vectors = collect_vectors(model.eval(), [data[np.arange(30)]["image"]])
    return rebuild_codebook(model, vectors, 6)


# name -> (model, what it trains on): a model joins every test of the trainer by a line here.
TINY: dict[str, tuple[Callable[[], nn.Module], Callable[[], Dataset]]] = {
    "vqvae": (vqvae, images),
    "vqgan": (vqgan, lambda: images(8)),
    "dqvae": (dqvae, patches),
    "dqvae_entropy": (dqvae_entropy, patches),
    "vqddm": (vqddm, codes),
    "vqddm_unet": (vqddm_unet, codes),
    "raster_gpt": (raster_gpt, codes),
    "dq_transformer": (dq_transformer, dynamic_codes),
    "refit_vqvae": (lambda: refit(vqvae(), images()), images),
    "refit_vqgan": (lambda: refit(vqgan(), images(8)), lambda: images(8)),
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


def new_run(name: str, folder: Path) -> Path:
    """A folder for a training of a tiny model."""
    return create_run(folder, kind_of(TINY[name][0]()), {}).path


def train_tiny(name: str, run: Path, *, resume: bool = False, held_out: bool = False, **settings) -> nn.Module:
    """Train a tiny model in a run's folder, from weights that are the same every time."""
    make, data = TINY[name]
    torch.manual_seed(0)
    dataset = data()
    config = TrainConfig(**SETTINGS | settings)
    return train(make(), dataset, config, run, held_out=dataset if held_out else None, resume=resume)


def break_at_step_3(model_class: type[nn.Module]) -> None:
    training_step = model_class.training_step

    def breaks(self, batch, step, *part):
        if step == 3:
            raise RuntimeError("this process breaks on purpose")
        return training_step(self, batch, step, *part)

    model_class.training_step = breaks


if __name__ == "__main__":
    folder, name = Path(sys.argv[1]), sys.argv[2]
    settings = {}
    for setting, value in (argument.split("=") for argument in sys.argv[3:]):
        try:
            settings[setting] = ast.literal_eval(value)
        except ValueError:
            settings[setting] = value
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    if settings.pop("dies", None) == int(rank):
        break_at_step_3(type(TINY[name][0]()))
    trained = train_tiny(name, folder / "run", **settings)
    state = {key: whole(value.detach()).numpy() for key, value in trained.state_dict().items()}
    np.savez(folder / f"{rank}.npz", **state)
