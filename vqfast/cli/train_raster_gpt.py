"""`vqfast train raster_gpt`."""

import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vqfast.cli.latents import latents
from vqfast.cli.train_vqddm import copy_autoencoder
from vqfast.cli.training import (
    AUTOENCODER,
    begin,
    check_channels,
    describe,
    start,
)
from vqfast.data import open_dataset
from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig
from vqfast.train import TrainConfig, load_autoencoder, train
from vqfast.train.checkpoint import WEIGHTS, newest_checkpoint


@dataclass
class TrainRasterGPT:
    """Train a GPT on the codes that a trained autoencoder gives to images, row by row: the baseline."""

    vqvae: Path
    """Run of the VQ-VAE or VQGAN."""
    data: str
    """Images to model: see vqfast train vqvae."""
    out: Path
    """Folder of the run; made, and never overwritten."""
    unconditional: bool = False
    """Leave out the classes even where the data has them."""
    dim: int = 256
    """Width of the network; a multiple of heads."""
    depth: int = 12
    """Number of blocks."""
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
        autoencoder = load_autoencoder(self.vqvae)
        data = open_dataset(self.data, image_size=autoencoder.config.image_size)
        check_channels(data, autoencoder)
        conditional = data.labels is not None and not self.unconditional
        config = RasterGPTConfig(
            codebook_size=autoencoder.config.codebook_size,
            grid=(autoencoder.config.grid_size,) * 2,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            dropout=self.dropout,
            num_classes=len(data.classes) if conditional else None,
            class_dropout=self.class_dropout,
        )
        torch.manual_seed(self.training.seed)
        model = RasterGPT(config)
        weights = newest_checkpoint(self.vqvae).path
        info = {
            "model": asdict(config),
            "data": describe(data),
            "vqvae": {"weights": zlib.crc32((weights / WEIGHTS).read_bytes())},
            "training": asdict(self.training),
        }
        begin(self, "train raster_gpt", info, processes)
        if processes.is_main_process:
            copy_autoencoder(self.vqvae, weights, self.out / AUTOENCODER)

        codes, held_out = latents(self, autoencoder, weights, data, processes)

        def pictures(model: RasterGPT, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            """Held-out images as their codes show them, and as many samples of the same classes."""
            drawn = model.sample(len(batch["codes"]), batch.get("label") if conditional else None)
            return {"held out": autoencoder.decode_codes(batch["codes"]), "samples": autoencoder.decode_codes(drawn)}

        train(model, codes, self.training, self.out, held_out=held_out, resume=self.resume, pictures=pictures)
        processes.print(
            f"{self.out}: trained a raster-order GPT for {self.training.steps} steps on {len(codes)} encoded images"
        )
