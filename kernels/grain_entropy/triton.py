"""Patch entropy in Triton: a program a patch, its histogram in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels.fusion_triton import FUSED
from vqfast.kernels.grain_entropy.reference import EPSILON, GREY


@triton.jit(do_not_specialize=["rows", "columns", "P", "bins", "lowest", "spacing", "sigma"])
def _grain_entropy_kernel(
    images_ptr, entropy_ptr, rows, columns, P, bins, stride_b, stride_c, stride_y, stride_x,
    lowest: tl.float64, spacing: tl.float64, sigma: tl.float64, RED: tl.constexpr, GREEN: tl.constexpr,
    BLUE: tl.constexpr, EPSILON: tl.constexpr, COLOUR: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    patch = tl.program_id(0).to(tl.int64)
    image, y, x = patch // columns // rows, patch // columns % rows, patch % columns
    first = images_ptr + image * stride_b + y * P * stride_y + x * P * stride_x
    dtype: tl.constexpr = entropy_ptr.dtype.element_ty
    k = tl.arange(0, BINS)
    bin = lowest + k.to(tl.float64) * spacing
    density = tl.zeros((BINS,), tl.float64)
    for i0 in range(0, P * P, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        inside = i < P * P
        pixel = first + (i // P).to(tl.int64) * stride_y + (i % P).to(tl.int64) * stride_x
        grey = tl.load(pixel, mask=inside, other=0.0).to(tl.float64)
        if COLOUR:
            green = tl.load(pixel + stride_c, mask=inside, other=0.0).to(tl.float64)
            blue = tl.load(pixel + 2 * stride_c, mask=inside, other=0.0).to(tl.float64)
            grey = RED * grey + GREEN * green + BLUE * blue
        # The difference in float64: a float32 grey level is off by a hundred-thousandth of sigma.
        distance = ((grey[:, None] - bin[None, :]) / sigma).to(dtype)
        weight = tl.exp(-0.5 * distance * distance)
        density += tl.sum(tl.where(inside[:, None], weight, 0.0), 0).to(tl.float64)
    density = tl.where(k < bins, density, 0.0) / (P * P)
    p = density / (tl.sum(density, 0) + EPSILON) + EPSILON
    entropy = tl.sum(tl.where(k < bins, -p * tl.log(p), 0.0), 0)
    tl.store(entropy_ptr + patch, entropy.to(dtype))


def grain_entropy(
    images: Tensor, patch_size: int, num_bins: int, sigma: float, lowest: float, highest: float
) -> Tensor:
    B, C, H, W = images.shape
    rows, columns = H // patch_size, W // patch_size
    dtype = torch.promote_types(images.dtype, torch.float32)
    entropy = torch.empty((B, rows, columns), dtype=dtype, device=images.device)
    if entropy.numel():
        bins = triton.next_power_of_2(num_bins)
        _grain_entropy_kernel[(entropy.numel(),)](
            images, entropy, rows, columns, patch_size, num_bins, *images.stride(),
            lowest, (highest - lowest) / (num_bins - 1), sigma, *GREY, EPSILON, COLOUR=C == 3,
            BLOCK=max(1024 // bins, 1), BINS=bins, **FUSED,
        )  # fmt: skip
    return entropy
