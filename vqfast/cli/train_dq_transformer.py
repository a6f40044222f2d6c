"""`vqfast train dq_transformer`."""

import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vqfast.cli.latents import latents
from vqfast.cli.train_vqddm import copy_autoencoder
from vqfast.cli.training import (
    DYNAMIC_AUTOENCODER,
    begin,
    check_channels,
    describe,
    start,
)
from vqfast.data import open_dataset
from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.dqvae import DQVAE
from vqfast.train import TrainConfig, load_model, train
from vqfast.train.checkpoint import WEIGHTS, newest_checkpoint


@dataclass
class TrainDQTransformer:
    """Train a DQ-Transformer on the codes of variable length that a trained DQ-VAE gives to images."""

    dqvae: Path
    """Run of the DQ-VAE."""
    data: str
    """Images to model: see vqfast train vqvae."""
    out: Path
    """Folder of the run; made, and never overwritten."""
    unconditional: bool = False
    """Leave out the classes even where the data has them."""
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
    class_dropout: float = 0.1
    """Share of labels hidden in training, which --guidance and sampling without a class need."""
    resume: bool = False
    """Go on where the run in --out stopped: the same command with this added."""
    training: TrainConfig = field(default_factory=lambda: TrainConfig(lr=5e-4, beta2=0.95))

    def execute(self) -> None:
        processes = start(self)
        autoencoder: DQVAE = load_model(self.dqvae, "dqvae")
        data = open_dataset(self.data, image_size=autoencoder.config.image_size)
        check_channels(data, autoencoder)
        conditional = data.labels is not None and not self.unconditional
        config = DQTransformerConfig(
            codebook_size=autoencoder.config.codebook_size,
            grid=(autoencoder.config.fine_grid_size,) * 2,
            num_grains=autoencoder.config.grains,
            order=self.order,
            dim=self.dim,
            heads=self.heads,
            position_depth=self.position_depth,
            content_depth=self.content_depth,
            dropout=self.dropout,
            max_length=None,
            num_classes=len(data.classes) if conditional else None,
            class_dropout=self.class_dropout,
        )
        torch.manual_seed(self.training.seed)
        model = DQTransformer(config)
        weights = newest_checkpoint(self.dqvae).path
        info = {
            "model": asdict(config),
            "data": describe(data),
            "dqvae": {"weights": zlib.crc32((weights / WEIGHTS).read_bytes())},
            "training": asdict(self.training),
        }
        begin(self, "train dq_transformer", info, processes)
        if processes.is_main_process:
            copy_autoencoder(self.dqvae, weights, self.out / DYNAMIC_AUTOENCODER)

        codes, held_out = latents(self, autoencoder, weights, data, processes)

        def pictures(model: DQTransformer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            """Held-out images as their codes show them, and as many samples of the same classes."""
            drawn, _ = model.sample(len(batch["codes"]), batch.get("label") if conditional else None)
            return {"held out": autoencoder.decode_codes(batch["codes"]), "samples": autoencoder.decode_codes(drawn)}

        train(model, codes, self.training, self.out, held_out=held_out, resume=self.resume, pictures=pictures)
        processes.print(
            f"{self.out}: trained a DQ-Transformer for {self.training.steps} steps on {len(codes)} encoded images"
        )
