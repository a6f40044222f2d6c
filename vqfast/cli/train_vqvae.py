"""`vqfast train vqvae`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from vqfast.cli.training import mults_for, open_square, start, train_on_images
from vqfast.models.vqvae import VQVAE, VQVAEConfig
from vqfast.train import TrainConfig


@dataclass
class TrainVQVAE:
    """Train a VQ-VAE: images to a small grid of codes and back."""

    data: str
    """Folder of images, .zip, .npz, idx or idx.gz file, or digits."""
    out: Path
    """Folder of the run; made, and never overwritten."""
    image_size: int | None = None
    """Resize and crop all images to this many pixels a side. Default: their own size."""
    random_crop_from: int | None = None
    """Resize images to this many pixels a side, and train on squares of --image-size cut out at random."""
    flip: bool = False
    """Mirror training images left to right at random."""
    channels: int = 64
    """Base width of the network; a multiple of 32."""
    mults: tuple[int, ...] | None = None
    """Width of each level as a multiple of the base; each level after the first halves the resolution.
    Default: chosen by the image size."""
    num_res_blocks: int = 2
    """Residual blocks a level."""
    attention_resolutions: tuple[int, ...] = ()
    """Resolutions in pixels at which all positions attend to each other."""
    dropout: float = 0.0
    """In the residual blocks; helps where there are few images."""
    codebook_size: int = 512
    """Number of codes."""
    code_dim: int = 64
    """Size of a code."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss."""
    reconstruction_loss: Literal["l2", "l1"] = "l2"
    """How images are compared."""
    resume: bool = False
    """Go on where the run in --out stopped: the same command with this added."""
    training: TrainConfig = field(default_factory=TrainConfig)

    def execute(self) -> None:
        processes = start(self)
        data, size = open_square(self)
        config = VQVAEConfig(
            image_size=size,
            in_channels=data.channels,
            channels=self.channels,
            mults=self.mults or mults_for(size),
            num_res_blocks=self.num_res_blocks,
            attention_resolutions=self.attention_resolutions,
            dropout=self.dropout,
            codebook_size=self.codebook_size,
            code_dim=self.code_dim,
            commitment_weight=self.commitment_weight,
            reconstruction_loss=self.reconstruction_loss,
        )
        torch.manual_seed(self.training.seed)
        train_on_images(self, "train vqvae", VQVAE(config), data, processes, flip=self.flip)
