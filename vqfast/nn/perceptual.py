"""LPIPS: how different two images look, by the features of a VGG16 (Zhang et al. 2018, arXiv 1801.03924)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers of the convolutions in torchvision's vgg16().features, in the five stages whose ends are compared.
_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_WIDTHS = (64, 128, 256, 512, 512)
SMALLEST = 16
# Mean and deviation of ImageNet's pixels, for values in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    width = 3
    for stage, (layers, out) in enumerate(zip(_STAGES, _WIDTHS, strict=True)):
        for layer in layers:
            shapes[f"features.{layer}.weight"] = (out, width, 3, 3)
            shapes[f"features.{layer}.bias"] = (out,)
            width = out
        shapes[f"lin{stage}.model.1.weight"] = (1, out, 1, 1)
    return shapes


class LPIPS(nn.Module):
    """Learned perceptual distance of image pairs, frozen.

    The weights are the user's: VGG16 under torchvision's names, `features.N.weight` and `.bias`, and the five 1 x 1
    layers under LPIPS's names, `lin0.model.1.weight` to `lin4.model.1.weight`; other names are left alone. They are
    buffers that are not part of a state dict: a checkpoint that holds this module stays small and loads without it.

    Args:
        weights: name to tensor.

    Raises:
        ValueError: a weight is missing or of another shape.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        shapes = _shapes()
        missing = [name for name in shapes if name not in weights]
        if missing:
            raise ValueError(
                f"weights: expected those of VGG16 (features.N) and of LPIPS (linN.model.1), "
                f"got none for {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
            )
        for name, shape in shapes.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"weights: expected {name} of shape {shape}, got {tuple(weights[name].shape)}")
            self.register_buffer(_buffer(name), weights[name].detach().float(), persistent=False)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distance of each pair, differentiable in both.

        Args:
            images, reference: (B, C, H, W) float in [-1, 1], C = 3, or 1 for grey; at least 16 pixels a side.

        Returns:
            (B,) float32, 0 for equal images.

        Raises:
            ValueError: shapes that differ or are not these.
        """
        if images.shape != reference.shape or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images: expected (B, 1 or 3, H, W) as reference has, {tuple(reference.shape)}, "
                f"got {tuple(images.shape)}"
            )
        if min(images.shape[2:]) < SMALLEST:
            raise ValueError(f"images: expected at least {SMALLEST} pixels a side, got {tuple(images.shape)}")
        pair = (side.expand(-1, 3, -1, -1).to(self.shift.dtype) for side in (images, reference))
        x, y = ((side - self.shift) / self.scale for side in pair)
        distance = x.new_zeros(len(x), dtype=torch.float32)
        for stage, layers in enumerate(_STAGES):
            if stage:
                x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
            for layer in layers:
                x, y = self._convolve(x, layer), self._convolve(y, layer)
            difference = (_unit(x) - _unit(y)).square()
            weight = getattr(self, _buffer(f"lin{stage}.model.1.weight"))
            distance = distance + (difference * weight).sum(1).mean(dim=(1, 2))
        return distance

    def _convolve(self, x: Tensor, layer: int) -> Tensor:
        weight = getattr(self, _buffer(f"features.{layer}.weight"))
        bias = getattr(self, _buffer(f"features.{layer}.bias"))
        return F.relu(F.conv2d(x, weight, bias, padding=1))


def _buffer(name: str) -> str:
    """A buffer's name holds no dots."""
    return name.replace(".", "_")


def _unit(x: Tensor) -> Tensor:
    """Each position's features at length 1."""
    x = x.float()
    return x / (x.norm(dim=1, keepdim=True) + 1e-10)
