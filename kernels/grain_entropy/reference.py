"""Definition of the entropy of image patches by a soft histogram."""

import torch
from torch import Tensor

# Grey level of red, green and blue (ITU-R BT.601, four digits).
GREY = (0.2989, 0.587, 0.114)
# Keeps 0 / 0 and log 0 away; a float32 subnormal.
EPSILON = 1e-40


def grain_entropy(
    images: Tensor, patch_size: int, num_bins: int, sigma: float, lowest: float, highest: float
) -> Tensor:
    """-sum_j p_j log p_j with p_j proportional to sum over the patch's pixels v of exp(-((v - bin_j) / sigma)^2 / 2).

    Args:
        images: (B, C, H, W) float, C = 3 (red, green, blue) or 1 (grey).
        patch_size: P; H and W are multiples of it.
        num_bins: bins are num_bins points from lowest to highest, both included.

    Returns:
        (B, H / P, W / P) float32 (float64 for float64 images), nats.
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    weights = torch.tensor(GREY if images.shape[1] == 3 else (1.0,), dtype=torch.float64, device=images.device)
    grey = (images.double() * weights[:, None, None]).sum(1)
    B, H, W = grey.shape
    patches = grey.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size).flatten(3)
    bins = torch.linspace(lowest, highest, num_bins, dtype=torch.float64, device=images.device)
    # One bin at a time: all at once would take num_bins times the memory of the image.
    density = torch.stack([torch.exp(-(((patches - b) / sigma).square()) / 2).mean(-1) for b in bins], -1)
    p = density / (density.sum(-1, keepdim=True) + EPSILON) + EPSILON
    return -(p * p.log()).sum(-1).to(dtype)
