"""`vqfast train vqvae`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vqfast.cli.options import config_from
from vqfast.cli.sizes import mults_for
from vqfast.cli.train_autoencoder import AutoencoderTraining
from vqfast.models.vqvae import VQVAE, VQVAEConfig


@dataclass(kw_only=True)
class TrainVQVAE(AutoencoderTraining):
    """Train a VQ-VAE: images to a small grid of codes and back."""

    command: ClassVar[str] = "train vqvae"

    data: str
    """Folder of images, .zip, .tar shards, saved Hugging Face dataset, .npz, idx or idx.gz file, or digits."""
    channels: int = 64
    dropout: float = 0.0
    """In the residual blocks; helps where there are few images."""
    codebook_size: int = 512
    code_dim: int = 64
    reconstruction_loss: Literal["l2", "l1"] = "l2"
    """How images are compared."""

    def model(self, image_size: int, in_channels: int) -> VQVAE:
        mults = self.mults or mults_for(image_size)
        return VQVAE(config_from(self, VQVAEConfig, image_size=image_size, in_channels=in_channels, mults=mults))
