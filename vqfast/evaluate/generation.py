"""What generative models of codes draw, measured, and which of two draws better: by all trainings of both.

VQ-DDM claims it of discrete diffusion (Hu et al. 2022, arXiv 2112.01799), DQ-Transformer of an order coarse to fine
(Huang et al. 2023, arXiv 2305.11718), both against raster order. A classifier trained on the real images judges.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqfast.evaluate.claims import Claim, bootstrap, bootstrap_of_mean
from vqfast.evaluate.codes import copied
from vqfast.evaluate.frechet import Classifier, frechet_distance
from vqfast.evaluate.timed_training import clock

BATCH = 64  # of images that are drawn together


@dataclass(frozen=True)
class Samples:
    """What one training of a model draws.

    images: (n, H, W, C) uint8. features: (n, D) float, of the classifier that judges. right: (n,) float, 1 where it
    reads the class asked for. seconds: (batches,) float, of drawing the codes of an image. copied: share of the samples
    whose codes are those of a training image. grains: (n, h, w) int64 of codes of variable length, None of others.
    """

    images: np.ndarray
    features: Tensor
    right: Tensor
    seconds: Tensor
    copied: float
    grains: Tensor | None = None


@dataclass(frozen=True)
class Trained:
    """One training of one model.

    steps: taken in its time. samples: by the name of the way of drawing; claims are judged by the first.
    """

    steps: int
    samples: dict[str, Samples]

    @property
    def judged(self) -> Samples:
        """Those of the first way."""
        return next(iter(self.samples.values()))


def measure_samples(
    draw: Callable[..., Tensor | tuple[Tensor, Tensor]],
    decode: Callable[[Tensor], np.ndarray],
    labels: Tensor,
    classifier: Classifier,
    training_codes: Tensor,
    generator: torch.Generator,
) -> Samples:
    """Draw an image for each label.

    Args:
        draw: (n, labels, generator=) to (n, h, w) codes, or to those and their grains: a model's `sample`.
        decode: codes to (n, H, W, C) uint8.
        labels: (n,) int64.
        training_codes: (M, h, w).
        generator: of the noise; its device is the model's.
    """
    parts, seconds = [], []
    for part in labels.split(BATCH):
        start = clock(generator.device)
        drawn = draw(len(part), part, generator=generator)
        seconds.append((clock(generator.device) - start) / len(part))
        parts.append(drawn if isinstance(drawn, tuple) else (drawn,))
    codes, *grains = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    images = decode(codes)
    features = classifier.features_of(images)
    return Samples(
        images,
        features,
        class_read(classifier, features, labels),
        torch.tensor(seconds),
        copied(codes, training_codes),
        *grains,
    )


@torch.no_grad()
def class_read(classifier: Classifier, features: Tensor, labels: Tensor) -> Tensor:
    """(n,) float64: 1 where the classifier reads the label (n,) in the features (n, D)."""
    return (classifier.head(features).argmax(1) == labels).double()


def judge_samples(
    ours: Sequence[Trained], theirs: Sequence[Trained], real: Tensor, *, resamples: int = 300, seed: int = 0
) -> list[Claim]:
    """The claims that one model draws better and faster than another.

    Args:
        ours, theirs: trainings of both models, as many of each.
        real: (M, D) features of held-out images.
        resamples, seed: of the bootstrap.
    """

    def stacked(figure: str, trainings: Sequence[Trained]) -> Tensor:
        return torch.stack([getattr(one.judged, figure).double() for one in trainings])

    features = [stacked("features", trainings) for trainings in (ours, theirs)]

    def nearer(s: Tensor, i: Tensor) -> Tensor:
        own, other = (np.mean([frechet_distance(f[k][i], real) for k in s.tolist()]) for f in features)
        return torch.tensor(other - own)

    def more(text: str, figure: str, sign: int = 1) -> Claim:
        return bootstrap_of_mean(text, sign * (stacked(figure, ours) - stacked(figure, theirs)), resamples, seed)

    trainings, images, _ = features[0].shape
    return [
        bootstrap("samples: nearer to real images (Frechet distance)", nearer, trainings, images, resamples, seed),
        more("samples: show the class asked for more often", "right"),
        more("samples: take less time an image (seconds)", "seconds", -1),
    ]
