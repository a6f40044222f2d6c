"""`vqfast train vqgan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from vqfast.cli.options import config_from
from vqfast.cli.perceptual import load_lpips
from vqfast.cli.sizes import most_disc_layers, mults_for
from vqfast.cli.train_autoencoder import AdversarialTraining
from vqfast.models.vqgan import VQGAN, VQGANConfig


@dataclass(kw_only=True)
class TrainVQGAN(AdversarialTraining):
    """Train a VQGAN: a VQ-VAE that a discriminator, and a perceptual loss if given, hold to sharp images."""

    command: ClassVar[str] = "train vqgan"

    lpips: tuple[Path, ...] = ()
    """Files that hold the weights of LPIPS: VGG16's (torchvision's names) and the linear layers', or a checkpoint of a
    training of taming's VQGAN, which has both. Default: no perceptual loss."""
    attention_resolutions: tuple[int, ...] = (16,)
    commitment_weight: float = 0.25
    """Weight of the commitment term against that of the codebook."""
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    """What the discriminator minimises."""
    disc_start: int = 10_000
    disc_weight: float = 0.8
    """Strength of the discriminator, on top of the adaptive weight."""

    def model(self, image_size: int, in_channels: int) -> VQGAN:
        config = config_from(
            self,
            VQGANConfig,
            image_size=image_size,
            in_channels=in_channels,
            mults=self.mults or mults_for(image_size),
            disc_layers=self.disc_layers or most_disc_layers(image_size),
        )
        return VQGAN(config, load_lpips(self.lpips))
