"""`vqfast train dqvae`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vqfast.cli.options import config_from
from vqfast.cli.perceptual import load_lpips
from vqfast.cli.sizes import most_disc_layers, mults_for
from vqfast.cli.train_autoencoder import AdversarialTraining
from vqfast.models.dqvae import DQVAE, DQVAEConfig


@dataclass(kw_only=True)
class TrainDQVAE(AdversarialTraining):
    """Train a DQ-VAE: images to codes of variable length, more of them where there is detail."""

    command: ClassVar[str] = "train dqvae"

    mults: tuple[int, ...] | None = None
    """Width of each level as a multiple of the base; each level after the first halves the resolution, down to the
    coarsest codes. Default: chosen by the image size."""
    attention_resolutions: tuple[int, ...] = (16, 32)
    z_channels: int = 256
    """Width of the features that are quantised."""
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

    def model(self, image_size: int, in_channels: int) -> DQVAE:
        config = config_from(
            self,
            DQVAEConfig,
            image_size=image_size,
            in_channels=in_channels,
            mults=self.mults or mults_for(image_size),
            disc_layers=self.disc_layers or most_disc_layers(image_size),
        )
        return DQVAE(config, load_lpips(self.lpips))
