"""`vqfast compare generation`: coarse to fine against raster order, at equal parameters and equal time."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vqfast.cli.encoding import decode, describe, encode_dynamic, images_for, labels_of
from vqfast.cli.options import check_out, config_from
from vqfast.cli.timed import TimedComparison
from vqfast.data import CodeBatches
from vqfast.evaluate.figures import save_grid
from vqfast.evaluate.frechet import frechet_distance
from vqfast.evaluate.generation import Generated
from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.dqvae import DQVAE
from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig
from vqfast.train import create_run, load_model
from vqfast.train.runs import write_json

SHOWN = 16
BATCH = 64


@dataclass(kw_only=True)
class CompareGeneration(TimedComparison):
    """Train a DQ-Transformer and a raster-order GPT on the codes of one DQ-VAE for the same time, and compare them."""

    dqvae: Path
    """Run of the DQ-VAE."""
    out: Path
    """Folder to make: results.json, samples.png."""
    dim: int = 128
    """Width of both models."""
    position_depth: int = 2
    """Blocks of the DQ-Transformer's position stack."""
    content_depth: int = 4
    """Blocks of its content stack; the GPT has as many as both together."""
    batch_size: int = 32

    def execute(self) -> None:
        check_out(self.out)
        self.check()
        autoencoder: DQVAE = load_model(self.dqvae, "dqvae")
        data = images_for(self.data, autoencoder)
        self.check_images(data)
        held_out = data.images[data.indices("held-out")]
        classifier = self.classifier(data)
        accuracy = classifier.accuracy(held_out, data.labels[data.indices("held-out")])
        real = classifier.features_of(held_out)
        codes, grains = encode_dynamic(autoencoder, data, "train")
        batches = CodeBatches(codes, labels_of(data, "train"), grains)
        labels = torch.arange(self.n) % len(data.classes)

        results, rows = [], [held_out[:SHOWN]]
        dynamic_tokens = float((4**grains).flatten(1).sum(1).double().mean()) + 2 * autoencoder.config.grains
        c = autoencoder.config
        shared = dict(codebook_size=c.codebook_size, grid=(c.fine_grid_size,) * 2, num_classes=len(data.classes))
        for name, model, tokens in (
            ("coarse to fine", self._dq_transformer(c.grains, shared), dynamic_tokens),
            ("raster order", self._raster_gpt(shared), float(codes[0].numel())),
        ):
            steps = self.fit(name, model, batches, self.seed)
            images, seconds = self._draw(model, autoencoder, labels)
            rows.append(images[:SHOWN])
            distance = frechet_distance(classifier.features_of(images), real)
            count = sum(p.numel() for p in model.parameters())
            results.append(Generated(name, count, steps, tokens, seconds / self.n, distance))

        # No generator on these codes can be expected to do better.
        floor = frechet_distance(classifier.features_of(decode(autoencoder, codes[: self.n])), real)
        info = {"dqvae": str(self.dqvae), "data": describe(data), "settings": self.settings("dqvae")}
        out = create_run(self.out, "compare_generation", info).path
        figures: dict[str, Any] = {
            "classifier_accuracy": accuracy,
            "frechet_of_reconstructions": floor,
            "results": [asdict(result) for result in results],
        }
        write_json(out / "results.json", figures)
        names = ["held out", *(result.name for result in results)]
        save_grid(
            out / "samples.png",
            rows,
            title="Coarse to fine and raster order",
            subtitle=f"{self.minutes:g} minutes of training each",
            labels=names,
        )
        for result in results:
            print(
                f"{result.name}: Frechet distance {result.frechet:.2f} (reconstructions {floor:.2f}), "
                f"{1e3 * result.seconds_per_image:.1f} ms an image of {result.tokens:.0f} tokens, "
                f"{result.parameters / 1e6:.2f} M parameters, {result.steps} steps"
            )

    def _dq_transformer(self, grains: int, shared: dict[str, Any]) -> DQTransformer:
        torch.manual_seed(self.seed)
        return DQTransformer(config_from(self, DQTransformerConfig, num_grains=grains, max_length=None, **shared))

    def _raster_gpt(self, shared: dict[str, Any]) -> RasterGPT:
        torch.manual_seed(self.seed)
        depth = self.position_depth + self.content_depth
        return RasterGPT(config_from(self, RasterGPTConfig, depth=depth, class_dropout=0.0, **shared))

    def _draw(self, model: nn.Module, autoencoder: DQVAE, labels: Tensor) -> tuple[np.ndarray, float]:
        """(n, H, W, C) uint8, and the seconds that drawing their codes took."""
        generator = torch.Generator().manual_seed(self.seed)
        start = time.perf_counter()
        drawn = model.sample(len(labels), labels, batch_size=BATCH, generator=generator)
        seconds = time.perf_counter() - start
        return decode(autoencoder, drawn[0] if isinstance(drawn, tuple) else drawn), seconds
