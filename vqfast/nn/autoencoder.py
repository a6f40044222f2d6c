"""The convolutional encoder and decoder of VQGAN (Esser et al. 2021, 'Taming Transformers', table 7)."""

import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.nn.blocks import GROUPS, Downsample, Upsample, group_norm, levels, middle


class Encoder(nn.Module):
    """Images to features: residual blocks at each resolution, halved between them.

    Args:
        in_channels: of the images.
        channels: of the first convolution; a multiple of `groups`.
        widths: channels of each level; each level after the first halves the resolution.
        out_channels: of the features.
        blocks: residual blocks a level.
        attention: whether each level attends.
        middle_attention: whether the blocks at the lowest resolution do.
        dropout: of the residual blocks.
        groups: of each normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        widths: tuple[int, ...],
        out_channels: int,
        *,
        blocks: int,
        attention: tuple[bool, ...],
        middle_attention: bool,
        dropout: float,
        groups: int = GROUPS,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.levels = levels((channels, *widths), blocks, attention, dropout, groups)
        self.downsamples = nn.ModuleList(Downsample(width) for width in widths[:-1])
        self.middle = middle(widths[-1], middle_attention, dropout, groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H / 2^(levels - 1), W / 2^(levels - 1))."""
        h = self.conv_in(images)
        for level, blocks in enumerate(self.levels):
            h = blocks(h)
            if level < len(self.downsamples):
                h = self.downsamples[level](h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Features to images: the encoder's levels in reverse, one residual block more in each.

    Args:
        in_channels: of the features.
        widths: channels of each level, those of the lowest resolution first; each level after the first doubles it.
        out_channels: of the images.
        blocks: residual blocks a level of the encoder; the decoder has the harder half and gets one more.
        attention, middle_attention, dropout, groups: see `Encoder`; attention in the order of `widths`.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...],
        out_channels: int,
        *,
        blocks: int,
        attention: tuple[bool, ...],
        middle_attention: bool,
        dropout: float,
        groups: int = GROUPS,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.middle = middle(widths[0], middle_attention, dropout, groups)
        self.levels = levels((widths[0], *widths), blocks + 1, attention, dropout, groups)
        self.upsamples = nn.ModuleList(Upsample(width) for width in widths[:-1])
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, out_channels, h * 2^(levels - 1), w * 2^(levels - 1))."""
        h = self.middle(self.conv_in(features))
        for level, blocks in enumerate(self.levels):
            h = blocks(h)
            if level < len(self.upsamples):
                h = self.upsamples[level](h)
        return self.conv_out(F.silu(self.norm_out(h)))
