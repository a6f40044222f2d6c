"""`vqfast compare generation`: coarse to fine against raster order, at equal parameters and equal time."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vqfast.cli.generate import decode
from vqfast.cli.train_vqddm import labels_of
from vqfast.cli.training import check_channels, describe, encode_dynamic
from vqfast.data import CodeBatches, DataError, open_dataset
from vqfast.evaluate.figures import save_grid
from vqfast.evaluate.frechet import fit_classifier, frechet_distance
from vqfast.evaluate.generation import Generated, fit_for
from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.dqvae import DQVAE
from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig
from vqfast.train import check_new, create_run, load_model
from vqfast.train.runs import write_json

SHOWN = 16
BATCH = 64


@dataclass
class CompareGeneration:
    """Train a DQ-Transformer and a raster-order GPT on the codes of one DQ-VAE for the same time, and compare them."""

    dqvae: Path
    """Run of the DQ-VAE."""
    data: str
    """Images with classes: see vqfast train vqvae. The classifier that judges is trained on them too."""
    out: Path
    """Folder to make: results.json, samples.png."""
    minutes: float = 10.0
    """Training time of each model."""
    n: int = 1000
    """Images to draw from each."""
    dim: int = 128
    """Width of both models."""
    position_depth: int = 2
    """Blocks of the DQ-Transformer's position stack."""
    content_depth: int = 4
    """Blocks of its content stack; the GPT has as many as both together."""
    heads: int = 4
    """Attention heads."""
    batch_size: int = 32
    """Images a training step."""
    lr: float = 1e-3
    """Highest learning rate."""
    classifier_steps: int = 600
    """Training steps of the classifier."""
    seed: int = 0
    """Of weights, order of images and noise."""

    def execute(self) -> None:
        check_new(self.out)
        if not self.minutes > 0:
            raise DataError(f"--minutes: expected a time above 0, got {self.minutes}")
        if self.n < 2:
            raise DataError(f"--n: expected at least 2 images, got {self.n}")
        autoencoder: DQVAE = load_model(self.dqvae, "dqvae")
        data = open_dataset(self.data, image_size=autoencoder.config.image_size)
        check_channels(data, autoencoder)
        if data.labels is None or data.held_out.sum() < 2:
            raise DataError(f"{self.data}: expected images with classes, and enough of them to hold some out")
        held_out = data.images[data.indices("held-out")]
        classifier = fit_classifier(
            data.images[data.indices("train")], data.labels[data.indices("train")], self.classifier_steps, self.seed
        )
        accuracy = classifier.accuracy(held_out, data.labels[data.indices("held-out")])
        real = classifier.features_of(held_out)
        codes, grains = encode_dynamic(autoencoder, data, "train")
        batches = CodeBatches(codes, labels_of(data, "train"), grains)
        labels = torch.arange(self.n) % len(data.classes)

        results, rows = [], [held_out[:SHOWN]]
        dynamic_tokens = float((4**grains).flatten(1).sum(1).double().mean()) + 2 * autoencoder.config.grains
        for name, model, tokens in (
            ("coarse to fine", self._dq_transformer(autoencoder, len(data.classes)), dynamic_tokens),
            ("raster order", self._raster_gpt(autoencoder, len(data.classes)), float(codes[0].numel())),
        ):
            with tqdm(total=60 * self.minutes, desc=f"training {name}", unit="s") as bar:
                steps = fit_for(
                    model, batches, 60 * self.minutes, batch_size=self.batch_size, lr=self.lr, seed=self.seed,
                    report=lambda seconds, bar=bar: bar.update(min(seconds, bar.total - bar.n)),
                )  # fmt: skip
            images, seconds = self._draw(model, autoencoder, labels)
            rows.append(images[:SHOWN])
            distance = frechet_distance(classifier.features_of(images), real)
            count = sum(p.numel() for p in model.parameters())
            results.append(Generated(name, count, steps, tokens, seconds / self.n, distance))

        # No generator on these codes can be expected to do better.
        floor = frechet_distance(classifier.features_of(decode(autoencoder, codes[: self.n])), real)
        settings = {key: value for key, value in asdict(self).items() if key not in ("out", "dqvae")}
        info = {"dqvae": str(self.dqvae), "data": describe(data), "settings": settings}
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

    def _dq_transformer(self, autoencoder: DQVAE, classes: int) -> DQTransformer:
        c = autoencoder.config
        torch.manual_seed(self.seed)
        return DQTransformer(
            DQTransformerConfig(
                codebook_size=c.codebook_size,
                grid=(c.fine_grid_size,) * 2,
                num_grains=c.grains,
                dim=self.dim,
                heads=self.heads,
                position_depth=self.position_depth,
                content_depth=self.content_depth,
                max_length=None,
                num_classes=classes,
            )
        )

    def _raster_gpt(self, autoencoder: DQVAE, classes: int) -> RasterGPT:
        c = autoencoder.config
        torch.manual_seed(self.seed)
        return RasterGPT(
            RasterGPTConfig(
                codebook_size=c.codebook_size,
                grid=(c.fine_grid_size,) * 2,
                dim=self.dim,
                heads=self.heads,
                depth=self.position_depth + self.content_depth,
                num_classes=classes,
                class_dropout=0.0,
            )
        )

    def _draw(self, model: nn.Module, autoencoder: DQVAE, labels: Tensor) -> tuple[np.ndarray, float]:
        """(n, H, W, C) uint8, and the seconds that drawing their codes took."""
        generator = torch.Generator().manual_seed(self.seed)
        start = time.perf_counter()
        drawn = model.sample(len(labels), labels, batch_size=BATCH, generator=generator)
        seconds = time.perf_counter() - start
        return decode(autoencoder, drawn[0] if isinstance(drawn, tuple) else drawn), seconds
