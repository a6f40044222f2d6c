"""How far a set of images is from another, as a classifier sees them: the Frechet distance of its features.

Heusel et al. 2017 take the features of Inception, trained on ImageNet. Here a small classifier is trained on the real
images at hand, so that the figure means something for small images too; figures of different data do not compare.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.data import to_float
from vqfast.evaluate.moments import Moments

_BATCH = 128


class Classifier(nn.Module):
    """Convolutions that halve the resolution, a mean over positions, a linear layer.

    Args:
        channels: of the images.
        num_classes: number of classes.
        dim: number of features.
    """

    def __init__(self, channels: int, num_classes: int, dim: int = 64):
        super().__init__()
        widths = (channels, dim // 2, dim, dim)
        layers = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] to (B, dim)."""
        return self.trunk(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.features(images))

    @torch.no_grad()
    def features_of(self, images: np.ndarray) -> Tensor:
        """(N, H, W, C) uint8 to (N, dim)."""
        parts = range(0, len(images), _BATCH)
        return torch.cat([self.features(to_float(images[start : start + _BATCH])) for start in parts])

    @torch.no_grad()
    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Share of the images (N, H, W, C) uint8 whose label (N,) it tells."""
        return float((self.head(self.features_of(images)).argmax(1).numpy() == labels).mean())


def fit_classifier(images: np.ndarray, labels: np.ndarray, steps: int = 600, seed: int = 0) -> Classifier:
    """Train a classifier, with random shifts of up to two pixels, none in images of fewer than 14 a side.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,) int64, 0 to the number of classes - 1.

    Returns:
        In eval mode.
    """
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(images.shape[-1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    reach = min(2, min(images.shape[1:3]) // 14)
    for _ in range(steps):
        chosen = rng.integers(len(images), size=min(_BATCH, len(images)))
        shift = tuple(rng.integers(-reach, reach + 1, size=2))
        batch = to_float(np.roll(images[chosen], shift, axis=(1, 2)))
        optimizer.zero_grad()
        F.cross_entropy(model(batch), torch.from_numpy(labels[chosen])).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared 2-Wasserstein distance of Gaussians of these moments.

    Args:
        one, other: (N, D) and (M, D) float features, N and M at least 2.

    Raises:
        ValueError: other shapes.
    """
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or min(len(one), len(other)) < 2:
        raise ValueError(
            f"one, other: expected features (N, D) and (M, D) of at least two images, got {tuple(one.shape)} and "
            f"{tuple(other.shape)}"
        )
    return frechet_of_moments(Moments.of(one), Moments.of(other))


def frechet_of_moments(one: Moments, other: Moments) -> float:
    """`frechet_distance` of features of which nothing but the moments is left.

    Raises:
        ValueError: moments of fewer than two images, or of features of another size.
    """
    if one.mean.shape != other.mean.shape or min(one.count, other.count) < 2:
        raise ValueError(
            f"one, other: expected moments of at least two images each and of one size, got {one.count} images of "
            f"{len(one.mean)} features and {other.count} of {len(other.mean)}"
        )
    # tr (C1 C2)^(1/2) by symmetric matrices, which stays real where a covariance is not of full rank.
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
    traces = one.covariance.trace() + other.covariance.trace()
    return max(float((one.mean - other.mean).square().sum() + traces - 2 * cross), 0.0)
