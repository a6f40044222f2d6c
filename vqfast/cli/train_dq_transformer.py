"""`vqfast train dq_transformer`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from vqfast.cli.options import config_from
from vqfast.cli.train_codes import CodeTraining
from vqfast.cli.training import DYNAMIC_AUTOENCODER
from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.dqvae import DQVAE
from vqfast.train import TrainConfig


@dataclass(kw_only=True)
class TrainDQTransformer(CodeTraining):
    """Train a DQ-Transformer on the codes of variable length that a trained DQ-VAE gives to images."""

    command: ClassVar[str] = "train dq_transformer"
    source: ClassVar[str] = DYNAMIC_AUTOENCODER

    dqvae: Path
    """Run of the DQ-VAE."""
    order: Literal["row", "region"] = "row"
    """Of the codes within a grain: row by row, or cell by cell."""
    dim: int = 256
    """Width of both stacks; a multiple of heads."""
    position_depth: int = 3
    """Blocks of the stack that predicts positions."""
    content_depth: int = 9
    """Blocks of the stack that predicts contents."""
    heads: int = 8
    """Attention heads."""
    dropout: float = 0.1
    """Of embeddings, and of what attention and MLP add."""
    training: TrainConfig = field(default_factory=lambda: TrainConfig(lr=5e-4, beta2=0.95))

    def model(self, autoencoder: DQVAE, num_classes: int | None) -> DQTransformer:
        c = autoencoder.config
        config = config_from(
            self,
            DQTransformerConfig,
            codebook_size=c.codebook_size,
            grid=(c.fine_grid_size,) * 2,
            num_grains=c.grains,
            max_length=None,
            num_classes=num_classes,
        )
        return DQTransformer(config)
