"""What `vqfast train vqvae`, `vqgan` and `dqvae` share: options of data and networks, and how they train."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from vqfast.cli.options import Training
from vqfast.cli.training import start, train_on_images
from vqfast.data import DataError, ImageData, open_dataset
from vqfast.nn.blocks import GROUPS
from vqfast.train import TrainConfig


@dataclass(kw_only=True)
class AutoencoderTraining(Training):
    """Options of every autoencoder."""

    image_size: int | None = None
    """Resize and crop all images to this many pixels a side. Default: their own size."""
    random_crop_from: int | None = None
    """Resize images to this many pixels a side, and train on squares of --image-size cut out at random."""
    flip: bool = False
    """Mirror training images left to right at random."""
    channels: int = 128
    """Base width of the network; a multiple of --norm-groups."""
    mults: tuple[int, ...] | None = None
    """Width of each level as a multiple of the base; each level after the first halves the resolution.
    Default: chosen by the image size."""
    num_res_blocks: int = 2
    """Residual blocks a level."""
    attention_resolutions: tuple[int, ...] = ()
    """Resolutions in pixels at which all positions attend to each other."""
    dropout: float = 0.0
    """In the residual blocks."""
    norm_groups: int = GROUPS
    """Groups of each normalisation; 32 as published, of 128 channels or more. Of a group of one channel brightness and
    colour are lost: a network of 32 channels learns photos much sooner with 8 groups."""
    codebook_size: int = 1024
    """Number of codes."""
    code_dim: int = 256
    """Size of a code."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss."""

    def model(self, image_size: int, in_channels: int) -> nn.Module:
        """The model to train, for square images of this many pixels a side and channels."""
        raise NotImplementedError

    def execute(self) -> None:
        processes = start(self)
        data, size = self._images()
        torch.manual_seed(self.training.seed)
        train_on_images(self, self.model(size, data.channels), data, processes, flip=self.flip)

    def _images(self) -> tuple[ImageData, int]:
        """All of one square size, and the side in pixels that the model is to have.

        With random_crop_from they are larger than the model's, which gets a part of each.

        Raises:
            DataError: they cannot be read, or are not square, or smaller than their parts.
        """
        whole, size = self.random_crop_from, self.image_size
        if whole is not None and (size is None or size > whole):
            raise DataError(
                f"--random-crop-from {whole}: expected an --image-size of at most as many pixels, got {size}"
            )
        data = square_images(self.data, whole or size)
        return data, size or data.image_size[0]


@dataclass(kw_only=True)
class AdversarialTraining(AutoencoderTraining):
    """Options of those that a discriminator and a perceptual loss hold to sharp images."""

    lpips: tuple[Path, ...] = ()
    """Files that hold the weights of LPIPS: see vqfast train vqgan. Default: no perceptual loss."""
    z_channels: int = 256
    """Width of the encoder's output."""
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
    training: TrainConfig = field(default_factory=lambda: TrainConfig(beta1=0.5, beta2=0.9, weight_decay=0.0))


def square_images(source: str, image_size: int | None) -> ImageData:
    """Images of one square size.

    Raises:
        DataError: they cannot be read, or are not square.
    """
    data = open_dataset(source, image_size=image_size)
    height, width = data.image_size
    if height != width:
        raise DataError(f"{source}: images of {width}x{height} pixels: choose a square with --image-size")
    return data
