"""Likeness of two sets of images: PSNR and SSIM, per image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast.ops.checks import check_float

_WINDOW = 11
_SIGMA = 1.5


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, 10 log10(peak^2 / mean squared error).

    Args:
        images, reference: (N, C, H, W) float in [-1, 1] (so the peak is 2).

    Returns:
        (N,) float64, dB; infinite where the images are equal.

    Raises:
        TypeError: not float tensors.
        ValueError: shapes that differ or are not (N, C, H, W).
    """
    _check(images, reference)
    error = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, borders mirrored.

    In images of fewer than 6 pixels a side the window is cut to what mirroring can fill.

    Args:
        images, reference: (N, C, H, W) float in [-1, 1].

    Returns:
        (N,) float64, 1 where the images are equal.

    Raises:
        TypeError: not float tensors.
        ValueError: shapes that differ or are not (N, C, H, W).
    """
    _check(images, reference)
    # The luminance term is made for values from 0 on.
    x, y = images.double() + 1, reference.double() + 1
    channels, (height, width) = x.shape[1], x.shape[2:]
    rows, columns = _gaussian(height, x.device), _gaussian(width, x.device)
    border = (len(columns) // 2,) * 2 + (len(rows) // 2,) * 2

    def local_mean(values: Tensor) -> Tensor:
        values = F.pad(values, border, mode="reflect")
        values = F.conv2d(values, rows.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(values, columns.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x = local_mean(x * x) - mean_x**2
    var_y = local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.mean(dim=(1, 2, 3))


def _gaussian(side: int, device: torch.device) -> Tensor:
    reach = min(_WINDOW // 2, side - 1)
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64, device=device)
    weight = torch.exp(-(offset**2) / (2 * _SIGMA**2))
    return weight / weight.sum()


def _check(images: Tensor, reference: Tensor) -> None:
    for name, value in (("images", images), ("reference", reference)):
        check_float(name, value)
    if images.ndim != 4 or images.shape != reference.shape:
        raise ValueError(
            f"images: expected (N, C, H, W) as reference has, {tuple(reference.shape)}, got {tuple(images.shape)}"
        )
