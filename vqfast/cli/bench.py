"""The trainings of `vqfast compare vqddm` and `generation`: what they share, and how each is measured."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vqfast.cli.encoding import decode, labels_at, labels_of
from vqfast.cli.generators import noise
from vqfast.cli.sheets import spread
from vqfast.cli.timed import TimedComparison
from vqfast.data import CodeBatches, ImageData
from vqfast.evaluate.frechet import frechet_distance
from vqfast.evaluate.generation import Trained, measure_samples
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.dqvae import DQVAE

# The class of a model, and its configuration.
Make = tuple[type[nn.Module], Any]


class Bench:
    """What all trainings share: codes, held-out images, the classifier that judges.

    real: (N, H, W, C) uint8 held-out images, whose labels and classifier's features are beside them.

    Args:
        command: the comparison.
        data: its images.
        autoencoder: on the device to compute on.
        codes: (M, h, w) int64, of the training images. grains: theirs, where they are of variable length.
    """

    def __init__(
        self,
        command: TimedComparison,
        data: ImageData,
        autoencoder: Autoencoder | DQVAE,
        codes: Tensor,
        grains: Tensor | None = None,
    ):
        self.command, self.autoencoder, self.codes = command, autoencoder, codes
        self.device = next(autoencoder.parameters()).device
        self.batches = CodeBatches(codes, labels_of(data, "train"), grains)
        unseen = spread(data.indices("held-out"), command.held_out)
        self.real, self.real_labels = data.images[unseen], labels_at(data, unseen)
        self.classifier = command.classifier(data)
        self.real_features = self.classifier.features_of(self.real)
        self.labels = torch.arange(command.n) % len(data.classes)

    def train(self, models: dict[str, Make]) -> dict[str, list[Trained]]:
        """Train each model with each seed, in turn, so that a change of the machine's speed meets all of them."""
        trained: dict[str, list[Trained]] = {name: [] for name in models}
        for seed in range(self.command.seed, self.command.seed + self.command.seeds):
            for name, (model_class, config) in models.items():
                torch.manual_seed(seed)
                model = model_class(config).to(self.device)
                steps = self.command.fit(f"{name}, seed {seed}", model, self.batches, seed)
                trained[name].append(self.measure(name, model, steps, seed))
        return trained

    def measure(self, name: str, model: nn.Module, steps: int, seed: int) -> Trained:
        """What a training of so many steps has reached."""
        ways = tqdm(self.ways(name, model).items(), desc="sampling", leave=False)
        return Trained(
            steps,
            {
                way: measure_samples(
                    draw, self.decode, self.labels, self.classifier, self.codes, noise(seed, self.device)
                )
                for way, draw in ways
            },
        )

    def ways(self, name: str, model: nn.Module) -> dict[str, Callable]:
        """How the model of this name can draw, each by its name: see `measure_samples`. The first is judged."""
        raise NotImplementedError

    def accuracy(self) -> float:
        """Share of the held-out images whose class the classifier tells."""
        return self.classifier.accuracy(self.real, self.real_labels.numpy())

    def floor(self) -> float:
        """Frechet distance of reconstructions of training images: no model of these codes can be expected to have a
        smaller one."""
        return frechet_distance(
            self.classifier.features_of(self.decode(self.codes[: self.command.n])), self.real_features
        )

    def decode(self, codes: Tensor) -> np.ndarray:
        """(n, h, w) codes to (n, H, W, C) uint8."""
        return decode(self.autoencoder, codes)
