"""What makes features (and classes' logits) of images: networks whose weights are files of the user's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Features(NamedTuple):
    """features: (B, D) float32. logits: (B, K) float32, or None where the network has none."""

    features: Tensor
    logits: Tensor | None


# (B, C, H, W) float in [-1, 1], on the network's device, to features; C = 1 or 3.
Extractor = Callable[[Tensor], Features]

# What networks take, and values in [0, 1] as that.
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "0..1": lambda x: x,
    "-1..1": lambda x: 2 * x - 1,
    "0..255": lambda x: 255 * x,
    "uint8": lambda x: (255 * x).round().to(torch.uint8),
}


class TorchScriptFeatures:
    """A network in a TorchScript file: images (B, 3, H, W) to features (B, D), or to (features, logits).

    Args:
        path: the file.
        device: where it runs.
        size: side in pixels that images are resized to (bilinear, antialiased); None leaves them.
        values: of its input, one of VALUES.

    Raises:
        ValueError: the file cannot be read; on a call, the network fails or gives something else.
    """

    def __init__(self, path: Path, device: torch.device | str, *, size: int | None = None, values: str = "0..1"):
        if values not in VALUES:
            raise ValueError(f"values: expected one of {', '.join(VALUES)}, got {values!r}")
        try:
            self._network = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{path}: not a readable TorchScript file: {_reason(error)}") from error
        self._path, self._size, self._values = path, size, VALUES[values]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        images = _coloured(images)
        if self._size is not None:
            images = _resized(images, (self._size, self._size), "bilinear")
        try:
            output = self._network(self._values(images))
        except RuntimeError as error:
            raise ValueError(f"{self._path}: fails on images {tuple(images.shape)}: {_reason(error)}") from error
        features, logits = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
        for name, value in (("features", features), ("logits", logits)):
            if value is not None and not (isinstance(value, Tensor) and value.ndim == 2 and len(value) == len(images)):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{self._path}: expected {name} ({len(images)}, D) of so many images, got {got}")
        return Features(features.float(), None if logits is None else logits.float())


class InceptionFeatures:
    """The network of FID and IS: Inception v3 of 2015 as TensorFlow computes it, by the package torch-fidelity.

    Args:
        weights: its file weights-inception-2015-12-05-6726825d.pth, or one of these names and shapes.
        device: where it runs.

    Raises:
        ValueError: the package is not installed, or the file is not its weights.
    """

    def __init__(self, weights: Path, device: torch.device | str):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError(
                f"{weights}: Inception needs the package torch-fidelity, which does not load here "
                f"({_reason(error)}); install it, or give a TorchScript file"
            ) from error
        check_readable(weights)
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
        except Exception as error:  # whatever unpickling another kind of file may raise
            raise ValueError(f"{weights}: not the weights of torch-fidelity's Inception: {_reason(error)}") from error
        self._network = network.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        return Features(*self._network(VALUES["uint8"](_coloured(images))))


class TimmFeatures:
    """A classifier of the package timm, its features those before the last layer.

    Images are resized and normalised as it was trained.

    Args:
        name: such as resnet50.
        weights: file of its weights, as timm reads them; it downloads none.
        device: where it runs.

    Raises:
        ValueError: the package is not installed, it has no such network, or the file is not its weights.
    """

    def __init__(self, name: str, weights: Path, device: torch.device | str):
        try:
            import timm
            from timm.data import resolve_model_data_config
        except ImportError as error:
            raise ValueError(f"{name}: needs the package timm, which does not load here ({_reason(error)})") from error
        check_readable(weights)
        try:
            self._network = timm.create_model(name, pretrained=False, checkpoint_path=str(weights)).eval().to(device)
        except Exception as error:  # whatever unpickling another kind of file may raise
            raise ValueError(f"{weights}: not the weights of timm's {name}: {_reason(error)}") from error
        config: dict[str, Any] = resolve_model_data_config(self._network)
        self._size, self._mode = config["input_size"][1:], config["interpolation"]
        self._mean, self._std = (torch.tensor(config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        images = _resized(_coloured(images), self._size, self._mode)
        maps = self._network.forward_features((images - self._mean) / self._std)
        head = self._network.forward_head
        return Features(head(maps, pre_logits=True).float(), head(maps).float())


def check_readable(path: Path) -> None:
    """Raises OSError where a file cannot be opened: libraries say it in many ways."""
    path.open("rb").close()


def _coloured(images: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) in [-1, 1] to (B, 3, H, W) in [0, 1]."""
    return ((images.float().clamp(-1, 1) + 1) / 2).expand(-1, 3, -1, -1)


def _resized(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if images.shape[2:] == tuple(size):
        return images
    mode = mode if mode in ("bilinear", "bicubic") else "bilinear"
    return F.interpolate(images, size=tuple(size), mode=mode, align_corners=False, antialias=True).clamp(0, 1)


def _reason(error: Exception) -> str:
    """The last line of what may be a traceback of another interpreter."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
