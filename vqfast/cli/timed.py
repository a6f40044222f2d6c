"""What `vqfast compare vqddm` and `generation` share: options, and a time for each training."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from vqfast.cli.encoding import check_channels
from vqfast.cli.options import OnDevice
from vqfast.cli.train_autoencoder import AutoencoderTraining, square_images
from vqfast.data import CodeBatches, DataError, ImageData
from vqfast.evaluate.frechet import Classifier, fit_classifier
from vqfast.evaluate.timed_training import fit_for
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.dqvae import DQVAE
from vqfast.train import TrainConfig


@dataclass(kw_only=True)
class TimedComparison(OnDevice):
    """Options of comparisons at equal training time."""

    data: str
    """Images with classes: see vqfast train vqvae. The classifier that judges is trained on them too."""
    out: Path
    """Folder to make."""
    image_size: int | None = None
    """Resize images to this many pixels a side. Default: their own size, or that of the autoencoder given."""
    codebook_size: int = 128
    """Codes of the autoencoder that is trained where none is given."""
    minutes: float = 0.5
    """Time of each training."""
    seeds: int = 3
    """Trainings of each model."""
    n: int = 500
    """Images to draw from each training."""
    held_out: int = 500
    """Held-out images to measure on, at most."""
    heads: int = 4
    """Attention heads of both models."""
    batch_size: int = 64
    """Images a training step."""
    lr: float = 1e-3
    """Highest learning rate of both models."""
    classifier_steps: int = 600
    """Training steps of the classifier."""
    resamples: int = 300
    """Of the bootstrap that tells how sure a claim is."""
    seed: int = 0
    """Of the first training: weights, order of images and noise; each further one has the next."""

    def check(self) -> None:
        """Raises DataError where an option is out of range."""
        for name, least in (
            ("seeds", 1), ("n", 2), ("held_out", 2), ("batch_size", 1), ("classifier_steps", 1), ("resamples", 2),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise DataError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(self, name)}")
        for name, quantity in (("minutes", "time"), ("lr", "number")):
            if not getattr(self, name) > 0:
                raise DataError(f"--{name}: expected a {quantity} above 0, got {getattr(self, name)}")

    def images(self, given: Autoencoder | DQVAE | None) -> ImageData:
        """The images, as the autoencoder given takes them, or of --image-size.

        Raises:
            DataError: they cannot be read, are not square, do not fit, have no classes, or are too few.
        """
        data = square_images(self.data, given.config.image_size if given else self.image_size)
        if given:
            check_channels(data, given.config.in_channels)
        if data.labels is None or data.held_out.sum() < 2:
            raise DataError(f"{self.data}: expected images with classes, and enough of them to hold some out")
        return data

    def small(self, kind: type[AutoencoderTraining], name: str, steps: int, **options: Any) -> AutoencoderTraining:
        """The command that trains an autoencoder in minutes, in a folder of --out."""
        return kind(
            data=self.data,
            out=self.out / name,
            image_size=self.image_size,
            num_res_blocks=1,
            codebook_size=self.codebook_size,
            training=TrainConfig(steps=steps, lr=2e-3, warmup=50, device=self.device, seed=self.seed),
            **options,
        )

    def classifier(self, data: ImageData) -> Classifier:
        """Trained on the training images."""
        seen = data.indices("train")
        return fit_classifier(data.images[seen], data.labels[seen], self.classifier_steps, self.seed)

    def fit(self, name: str, model: nn.Module, codes: CodeBatches, seed: int) -> int:
        """Train a model for its time, behind a bar with its name; returns the steps taken."""
        seconds = 60 * self.minutes
        with tqdm(total=seconds, desc=f"training {name}", unit="s") as bar:
            return fit_for(
                model, codes, seconds, batch_size=self.batch_size, lr=self.lr, seed=seed,
                report=lambda passed: bar.update(min(passed, bar.total - bar.n)),
            )  # fmt: skip

    def settings(self, *left_out: str) -> dict[str, Any]:
        """The options as run.json has them, without `out` and those named."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", *left_out)}
