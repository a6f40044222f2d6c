"""What `vqfast compare vqddm` and `generation` share: a time for each training, and a classifier that judges."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from vqfast.data import CodeBatches, DataError, ImageData
from vqfast.evaluate.frechet import Classifier, fit_classifier
from vqfast.evaluate.generation import fit_for


@dataclass(kw_only=True)
class TimedComparison:
    """Options of comparisons at equal training time."""

    data: str
    """Images with classes: see vqfast train vqvae. The classifier that judges is trained on them too."""
    out: Path
    """Folder to make."""
    minutes: float = 10.0
    """Training time of each model."""
    n: int = 1000
    """Images to draw from each."""
    heads: int = 4
    """Attention heads of both."""
    batch_size: int = 64
    """Images a training step."""
    lr: float = 1e-3
    """Highest learning rate of both."""
    classifier_steps: int = 600
    """Training steps of the classifier."""
    seed: int = 0
    """Of weights, order of images and noise."""

    def check(self, **least: int) -> None:
        """Raises DataError where the time is none, or an option is below what is given as its least."""
        for name, value in ({"n": 2} | least).items():
            if getattr(self, name) < value:
                raise DataError(f"--{name.replace('_', '-')}: expected at least {value}, got {getattr(self, name)}")
        if not self.minutes > 0:
            raise DataError(f"--minutes: expected a time above 0, got {self.minutes}")

    def check_images(self, data: ImageData) -> None:
        """Raises DataError where images have no classes, or are too few."""
        if data.labels is None or data.held_out.sum() < 2:
            raise DataError(f"{self.data}: expected images with classes, and enough of them to hold some out")

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
