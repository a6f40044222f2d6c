"""`vqfast train dqvae`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from vqfast.cli.train_vqgan import load_lpips, most_disc_layers
from vqfast.cli.training import mults_for, open_square, start, train_on_images
from vqfast.models.dqvae import DQVAE, DQVAEConfig
from vqfast.train import TrainConfig


@dataclass
class TrainDQVAE:
    """Train a DQ-VAE: images to codes of variable length, more of them where there is detail."""

    data: str
    """Images: see vqfast train vqvae."""
    out: Path
    """Folder of the run; made, and never overwritten."""
    image_size: int | None = None
    """Resize and crop all images to this many pixels a side. Default: their own size."""
    random_crop_from: int | None = None
    """Resize images to this many pixels a side, and train on squares of --image-size cut out at random."""
    flip: bool = False
    """Mirror training images left to right at random."""
    lpips: tuple[Path, ...] = ()
    """Files that hold the weights of LPIPS: see vqfast train vqgan. Default: no perceptual loss."""
    router: Literal["feature", "entropy", "random", "fixed"] = "feature"
    """Who gives cells their codes: a network that learns with the rest, the entropy of the grey levels, chance, or
    nobody (all cells are fine)."""
    grains: int = 2
    """2: a cell has 1 or 4 codes; 3: 1, 4 or 16."""
    shares: tuple[float, ...] | None = None
    """Share of the cells that each finer grain is to get. Default: 0.5 with two grains, 0.3 0.3 with three."""
    budget_weights: tuple[float, ...] | None = None
    """Feature router: weight of missing each share. Default: 10 with two grains, 1 1 with three."""
    entropy_per: Literal["dataset", "image"] = "dataset"
    """Entropy router: shares over the whole data set, or in each image."""
    channels: int = 128
    """Base width of the network; a multiple of 32."""
    mults: tuple[int, ...] | None = None
    """Width of each level as a multiple of the base; each level after the first halves the resolution, down to the
    coarsest codes. Default: chosen by the image size."""
    num_res_blocks: int = 2
    """Residual blocks a level."""
    attention_resolutions: tuple[int, ...] = (16, 32)
    """Resolutions in pixels at which all positions attend to each other."""
    dropout: float = 0.0
    """In the residual blocks."""
    codebook_size: int = 1024
    """Number of codes."""
    code_dim: int = 256
    """Size of a code."""
    z_channels: int = 256
    """Width of the features that are quantised."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS."""
    disc_channels: int = 64
    """Width of the discriminator's first convolution."""
    disc_layers: int | None = None
    """Halvings in the discriminator. Default: 3, fewer for images too small for that."""
    disc_start: int = 0
    """First step in which the discriminator learns and is heard."""
    disc_weight: float = 1.0
    """Strength of the discriminator, on top of the adaptive weight; 0 trains without."""
    resume: bool = False
    """Go on where the run in --out stopped: the same command with this added."""
    training: TrainConfig = field(default_factory=lambda: TrainConfig(beta1=0.5, beta2=0.9, weight_decay=0.0))

    def execute(self) -> None:
        processes = start(self)
        perceptual = load_lpips(self.lpips)
        data, size = open_square(self)
        config = DQVAEConfig(
            image_size=size,
            in_channels=data.channels,
            router=self.router,
            grains=self.grains,
            shares=self.shares,
            budget_weights=self.budget_weights,
            entropy_per=self.entropy_per,
            channels=self.channels,
            mults=self.mults or mults_for(size),
            num_res_blocks=self.num_res_blocks,
            attention_resolutions=self.attention_resolutions,
            dropout=self.dropout,
            codebook_size=self.codebook_size,
            code_dim=self.code_dim,
            z_channels=self.z_channels,
            commitment_weight=self.commitment_weight,
            perceptual_weight=self.perceptual_weight,
            disc_channels=self.disc_channels,
            disc_layers=self.disc_layers or most_disc_layers(size),
            disc_start=self.disc_start,
            disc_weight=self.disc_weight,
        )
        torch.manual_seed(self.training.seed)
        model = DQVAE(config, perceptual)
        if not model.has_perceptual_loss:
            processes.print("no perceptual loss: --lpips names no weights of it")
        train_on_images(self, "train dqvae", model, data, processes, flip=self.flip)
