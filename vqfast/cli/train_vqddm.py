"""`vqfast train vqddm`."""

import shutil
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vqfast.cli.latents import latents
from vqfast.cli.training import AUTOENCODER, begin, check_channels, describe, start
from vqfast.data import ImageData, open_dataset
from vqfast.models.vqddm import VQDDM, VQDDMConfig
from vqfast.train import TrainConfig, load_autoencoder, train
from vqfast.train.checkpoint import INDEX, WEIGHTS, newest_checkpoint
from vqfast.train.runs import RUN_FILE

PREVIEW_STEPS = 50  # denoising steps of the samples that are drawn during training


@dataclass
class TrainVQDDM:
    """Train a VQ-DDM: discrete diffusion on the codes that a trained VQ-VAE gives to images."""

    vqvae: Path
    """Run of the VQ-VAE or VQGAN."""
    data: str
    """Images to model: see vqfast train vqvae."""
    out: Path
    """Folder of the run; made, and never overwritten."""
    unconditional: bool = False
    """Leave out the classes even where the data has them."""
    denoiser: Literal["unet", "transformer"] = "unet"
    """Network that predicts the clean codes."""
    dim: int = 128
    """Base width of the network."""
    mults: tuple[int, ...] | None = None
    """U-Net: width of each level as a multiple of the base. Default: chosen by the code grid."""
    depth: int = 12
    """Transformer: number of blocks."""
    heads: int = 8
    """Transformer: attention heads."""
    timesteps: int = 1000
    """Noise levels T."""
    schedule: Literal["cosine", "cosine_released", "linear"] = "cosine"
    """How the noise grows with the level."""
    class_dropout: float = 0.1
    """Share of labels hidden in training, which --guidance and sampling without a class need."""
    aux_weight: float = 0.0
    """Weight of the cross-entropy of the clean codes beside the variational bound."""
    resume: bool = False
    """Go on where the run in --out stopped: the same command with this added."""
    training: TrainConfig = field(default_factory=lambda: TrainConfig(ema_decay=0.999))

    def execute(self) -> None:
        processes = start(self)
        autoencoder = load_autoencoder(self.vqvae)
        data = open_dataset(self.data, image_size=autoencoder.config.image_size)
        check_channels(data, autoencoder)
        grid = (autoencoder.config.grid_size,) * 2
        conditional = data.labels is not None and not self.unconditional
        config = VQDDMConfig(
            codebook_size=autoencoder.config.codebook_size,
            grid=grid,
            denoiser=self.denoiser,
            dim=self.dim,
            mults=self.mults or halvings(grid[0]),
            depth=self.depth,
            heads=self.heads,
            T=self.timesteps,
            schedule=self.schedule,
            num_classes=len(data.classes) if conditional else None,
            class_dropout=self.class_dropout,
            aux_weight=self.aux_weight,
        )
        torch.manual_seed(self.training.seed)
        model = VQDDM(config)
        weights = newest_checkpoint(self.vqvae).path
        info = {
            "model": asdict(config),
            "data": describe(data),
            "vqvae": {"weights": zlib.crc32((weights / WEIGHTS).read_bytes())},
            "training": asdict(self.training),
        }
        begin(self, "train vqddm", info, processes)
        if processes.is_main_process:
            copy_autoencoder(self.vqvae, weights, self.out / AUTOENCODER)

        codes, held_out = latents(self, autoencoder, weights, data, processes)

        def pictures(model: VQDDM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            """Held-out images as their codes show them, and as many samples of the same classes."""
            labels = batch.get("label") if conditional else None
            drawn = model.sample(len(batch["codes"]), labels, steps=min(model.config.T, PREVIEW_STEPS))
            return {"held out": autoencoder.decode_codes(batch["codes"]), "samples": autoencoder.decode_codes(drawn)}

        train(model, codes, self.training, self.out, held_out=held_out, resume=self.resume, pictures=pictures)
        processes.print(f"{self.out}: trained a VQ-DDM for {self.training.steps} steps on {len(codes)} encoded images")


def copy_autoencoder(run: Path, weights: Path, target: Path) -> None:
    """Put an autoencoder's run, with the checkpoint `weights` of it alone, into the run of a model of its codes."""
    if target.exists():
        return
    folder = target.with_name(f".{target.name}")
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder / weights.relative_to(run)
    checkpoint.mkdir(parents=True)
    shutil.copy(run / RUN_FILE, folder)
    for name in (WEIGHTS, INDEX):
        shutil.copy(weights / name, checkpoint)
    folder.rename(target)


def labels_of(data: ImageData, split: str) -> Tensor | None:
    """(N,) int64 labels of a split of the data, where it has labels."""
    return None if data.labels is None else torch.from_numpy(data.labels[data.indices(split)])


def halvings(grid: int) -> tuple[int, ...]:
    """Levels of the U-Net, as many of the paper's four as the grid can be halved for."""
    mults = (1, 2, 4, 8)
    levels = 1
    while levels < len(mults) and grid % 2**levels == 0:
        levels += 1
    return mults[:levels]
