"""The networks of DQ-VAE: an encoder with an output for each grain, a decoder that knows where each code is."""

import torch
from torch import Tensor, nn

from vqfast.nn.autoencoder import Decoder
from vqfast.nn.blocks import GROUPS, Downsample, group_norm, levels, middle


class GrainEncoder(nn.Module):
    """Images to features on several grids: those of the last levels of resolution, each through a head of its own.

    The feature of a level is taken behind its blocks, before the resolution is halved.

    Args:
        in_channels: of the images.
        channels: of the first convolution; a multiple of `groups`.
        widths: channels of each level; each level after the first halves the resolution.
        out_channels: of every feature.
        grains: number of features.
        blocks: residual blocks a level.
        attention: whether each level attends; the heads always do.
        dropout: of the residual blocks.
        groups: of each normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        widths: tuple[int, ...],
        out_channels: int,
        grains: int,
        *,
        blocks: int,
        attention: tuple[bool, ...],
        dropout: float,
        groups: int = GROUPS,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.levels = levels((channels, *widths), blocks, attention, dropout, groups)
        self.downsamples = nn.ModuleList(Downsample(width) for width in widths[:-1])
        # Coarsest first, as grains are numbered.
        self.heads = nn.ModuleList(_head(width, out_channels, dropout, groups) for width in widths[: -grains - 1 : -1])

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) to `grains` features (B, out_channels, Hc * 2^g, Wc * 2^g), g = 0, 1, ..."""
        h = self.conv_in(images)
        outputs = []
        for level, blocks in enumerate(self.levels):
            h = blocks(h)
            outputs.append(h)
            if level < len(self.downsamples):
                h = self.downsamples[level](h)
        return [head(h) for head, h in zip(self.heads, reversed(outputs), strict=False)]


def _head(width: int, out_channels: int, dropout: float, groups: int) -> nn.Sequential:
    return nn.Sequential(
        middle(width, True, dropout, groups),
        group_norm(width, groups),
        nn.SiLU(),
        nn.Conv2d(width, out_channels, 3, padding=1),
    )


class PositionalDecoder(Decoder):
    """A VQGAN decoder that is told the position of each code, twice: by learned Fourier features and by a table.

    Args:
        in_channels: of the features.
        grid_size: side of the grid of the features.
        widths, out_channels, options: see `Decoder`.
    """

    def __init__(self, in_channels: int, grid_size: int, widths: tuple[int, ...], out_channels: int, **options):
        super().__init__(in_channels, widths, out_channels, **options)
        self.fourier = FourierPosition(in_channels)
        self.learned = LearnedPosition(in_channels, grid_size)

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_channels, grid_size, grid_size) to (B, out_channels, H, W)."""
        return super().forward(features + self.fourier(features) + self.learned(features))


class FourierPosition(nn.Module):
    """sin(W (x, y) + b) with coordinates in [-1, 1] and W learned (Anokhin et al. 2021, learned Fourier features)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(2, channels, 1)
        bound = (9 / 2) ** 0.5
        nn.init.uniform_(self.conv.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """The term to add to x (B, C, H, W): (1, C, H, W)."""
        height, width = x.shape[-2:]
        rows = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype)
        columns = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype)
        grid = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])
        return torch.sin(self.conv(grid[None]))


class LearnedPosition(nn.Module):
    """A vector for each row plus one for each column."""

    def __init__(self, channels: int, grid_size: int):
        super().__init__()
        self.rows = nn.Parameter(torch.empty(grid_size, channels))
        self.columns = nn.Parameter(torch.empty(grid_size, channels))
        for table in (self.rows, self.columns):
            nn.init.trunc_normal_(table)

    def forward(self, x: Tensor) -> Tensor:
        """The term to add to x (B, C, H, W), grid_size a side: (1, C, H, W)."""
        return (self.rows[:, None] + self.columns).permute(2, 0, 1)[None].to(x.dtype)
