"""Models of equal size: a raster-order transformer with as many parameters as the model that it is compared with."""

from typing import Any

import torch
from torch import nn

from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig

TOLERANCE = 0.02  # numbers of parameters that count as equal differ by this share at most


def parameter_count(model_class: type[nn.Module], config: Any) -> int:
    """Number of parameters of a model of this make; takes no memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(config).parameters())


def raster_equal(model_class: type[nn.Module], config: Any, depth: int) -> RasterGPTConfig:
    """The raster-order transformer for the codes of another model that has as many parameters, to 2 %.

    Args:
        model_class, config: the other model's make; codebook_size, grid, heads, num_classes and class_dropout of its
            configuration are taken over.
        depth: blocks wanted; the number taken is the nearest at which some width fits.

    Raises:
        ValueError: no width and depth fit.
    """
    wanted = parameter_count(model_class, config)
    for blocks in sorted(range(1, 2 * depth + 1), key=lambda blocks: abs(blocks - depth)):

        def make(units: int, blocks: int = blocks) -> RasterGPTConfig:
            return RasterGPTConfig(
                codebook_size=config.codebook_size,
                grid=config.grid,
                dim=units * config.heads,
                depth=blocks,
                heads=config.heads,
                num_classes=config.num_classes,
                class_dropout=config.class_dropout,
            )

        count = lambda units, make=make: parameter_count(RasterGPT, make(units))
        low, high = 1, 2
        while count(high) < wanted:
            low, high = high, 2 * high
        while high - low > 1:  # count(low) < wanted <= count(high)
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) < wanted else (low, middle)
        best = min(low, high, key=lambda units: abs(count(units) - wanted))
        if abs(count(best) - wanted) <= TOLERANCE * wanted:
            return make(best)
    raise ValueError(
        f"heads: no raster-order transformer of {config.heads} heads and up to {2 * depth} blocks has "
        f"{wanted} parameters to {TOLERANCE:.0%}; expected another width or depth, or fewer heads"
    )
