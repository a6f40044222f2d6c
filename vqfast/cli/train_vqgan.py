"""`vqfast train vqgan`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vqfast.cli.training import mults_for, open_square, start, train_on_images
from vqfast.models.converters import lpips_state_dict
from vqfast.models.vqgan import VQGAN, VQGANConfig
from vqfast.nn.perceptual import LPIPS
from vqfast.train import RunError, TrainConfig
from vqfast.train.foreign import read_weights


@dataclass
class TrainVQGAN:
    """Train a VQGAN: a VQ-VAE that a discriminator, and a perceptual loss if given, hold to sharp images."""

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
    """Files that hold the weights of LPIPS: VGG16's (torchvision's names) and the linear layers', or a checkpoint of a
    training of taming's VQGAN, which has both. Default: no perceptual loss."""
    channels: int = 128
    """Base width of the network; a multiple of 32."""
    mults: tuple[int, ...] | None = None
    """Width of each level as a multiple of the base; each level after the first halves the resolution.
    Default: chosen by the image size."""
    num_res_blocks: int = 2
    """Residual blocks a level."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Resolutions in pixels at which all positions attend to each other."""
    dropout: float = 0.0
    """In the residual blocks."""
    codebook_size: int = 1024
    """Number of codes."""
    code_dim: int = 256
    """Size of a code."""
    z_channels: int = 256
    """Width of the encoder's output."""
    commitment_weight: float = 0.25
    """Weight of the commitment term against that of the codebook."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS."""
    disc_channels: int = 64
    """Width of the discriminator's first convolution."""
    disc_layers: int | None = None
    """Halvings in the discriminator. Default: 3, fewer for images too small for that."""
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    """What the discriminator minimises."""
    disc_start: int = 10_000
    """First step in which the discriminator learns and is heard."""
    disc_weight: float = 0.8
    """Strength of the discriminator, on top of the adaptive weight."""
    resume: bool = False
    """Go on where the run in --out stopped: the same command with this added."""
    training: TrainConfig = field(default_factory=lambda: TrainConfig(beta1=0.5, beta2=0.9, weight_decay=0.0))

    def execute(self) -> None:
        processes = start(self)
        perceptual = load_lpips(self.lpips)
        data, size = open_square(self)
        config = VQGANConfig(
            image_size=size,
            in_channels=data.channels,
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
            disc_loss=self.disc_loss,
            disc_start=self.disc_start,
            disc_weight=self.disc_weight,
        )
        torch.manual_seed(self.training.seed)
        model = VQGAN(config, perceptual)
        if not model.has_perceptual_loss:
            processes.print("no perceptual loss: --lpips names no weights of it")
        train_on_images(self, "train vqgan", model, data, processes, flip=self.flip)


def load_lpips(paths: tuple[Path, ...]) -> LPIPS | None:
    """LPIPS with the weights in these files together; None for no files.

    Raises:
        RunError: a file that cannot be read, or weights that are missing or of another shape.
    """
    if not paths:
        return None
    weights: dict[str, Tensor] = {}
    for path in paths:
        weights |= lpips_state_dict(read_weights(path))
    try:
        return LPIPS(weights)
    except ValueError as error:
        raise RunError(f"{', '.join(map(str, paths))}: {error}") from error


def most_disc_layers(image_size: int) -> int:
    """The published three halvings, or as many as leave a logit."""
    return max(n for n in (1, 2, 3) if n == 1 or 3 * 2**n <= image_size)
