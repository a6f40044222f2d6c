"""`vqfast train raster_gpt`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from vqfast.cli.options import config_from
from vqfast.cli.train_codes import CodeTraining
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig
from vqfast.train import TrainConfig


@dataclass(kw_only=True)
class TrainRasterGPT(CodeTraining):
    """Train a GPT on the codes that a trained autoencoder gives to images, row by row: the baseline."""

    command: ClassVar[str] = "train raster_gpt"

    vqvae: Path
    """Run of the VQ-VAE or VQGAN."""
    dim: int = 256
    """Width of the network; a multiple of heads."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 8
    """Attention heads."""
    dropout: float = 0.1
    """Of embeddings, and of what attention and MLP add."""
    training: TrainConfig = field(default_factory=lambda: TrainConfig(lr=5e-4, beta2=0.95))

    def model(self, autoencoder: Autoencoder, num_classes: int | None) -> RasterGPT:
        K, size = autoencoder.config.codebook_size, autoencoder.config.grid_size
        return RasterGPT(
            config_from(self, RasterGPTConfig, codebook_size=K, grid=(size, size), num_classes=num_classes)
        )
