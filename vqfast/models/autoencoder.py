"""What VQ-VAE and VQGAN share: images to a grid of codes and back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqfast.models.batch import entry
from vqfast.nn.autoencoder import Decoder, Encoder
from vqfast.nn.blocks import GROUPS
from vqfast.nn.vector_quantize import VectorQuantize
from vqfast.ops.checks import check_indices, describe


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder. The code grid has image_size / 2^(len(mults) - 1) codes a side."""

    image_size: int = 32
    """Side of the square images, in pixels."""
    in_channels: int = 3
    """1 for grey images, 3 for RGB."""
    channels: int = 64
    """Base width; a multiple of norm_groups."""
    mults: tuple[int, ...] = (1, 2, 2)
    """Width of each level as a multiple of the base; each level after the first halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks a level."""
    attention_resolutions: tuple[int, ...] = ()
    """Resolutions (in pixels) at which positions attend to each other."""
    dropout: float = 0.0
    norm_groups: int = GROUPS
    """Groups of each normalisation. As published, of 128 channels or more; groups of one channel lose an image's
    brightness and colour, which narrow networks for photos need."""
    codebook_size: int = 512
    """Number of codes."""
    code_dim: int = 64
    """Size of a code."""
    freeze_encoder: bool = False
    """Train the decoder and the codebook alone: the second half of ReFiT (arXiv 2112.01799, section 3.2)."""

    def __post_init__(self):
        # JSON gives lists back.
        object.__setattr__(self, "mults", tuple(self.mults))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        check_sizes(self, "in_channels", "channels", "num_res_blocks", "norm_groups", "codebook_size", "code_dim")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a share of at least 0, below 1, got {self.dropout}")
        if not self.mults or min(self.mults) < 1:
            raise ValueError(f"mults: expected at least one multiple of at least 1, got {self.mults}")
        if self.image_size < self.downsampling or self.image_size % self.downsampling:
            raise ValueError(
                f"image_size: expected a multiple of {self.downsampling}, the pixels a side of a code with "
                f"mults {self.mults}, got {self.image_size}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels a side for each code."""
        return 2 ** (len(self.mults) - 1)

    @property
    def grid_size(self) -> int:
        """Codes a side."""
        return self.image_size // self.downsampling

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * m for m in self.mults)

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether each level attends."""
        return tuple(self.image_size // 2**level in self.attention_resolutions for level in range(len(self.mults)))


def check_sizes(config: object, *names: str) -> None:
    """Raises ValueError where a field of these names is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")


def check_images(images: Tensor, config: AutoencoderConfig) -> None:
    """Raises TypeError or ValueError where images are not (B, in_channels, image_size, image_size) float."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"images: expected a float tensor of values in [-1, 1], got {describe(images)}")
    size, channels = config.image_size, config.in_channels
    if images.ndim != 4 or images.shape[1:] != (channels, size, size):
        raise ValueError(f"images: expected (B, {channels}, {size}, {size}), got {tuple(images.shape)}")


def codebook_scalars(quantizer: VectorQuantize, **loss: Tensor) -> dict[str, Tensor]:
    """The quantiser's loss, by its name, and how evenly its codes are used: of training batches alone.

    In eval mode it has no loss, and usage and perplexity would still be those of training.
    """
    if not quantizer.training:
        return {}
    scalars = {name: value.detach() for name, value in loss.items()}
    return scalars | {"usage": quantizer.usage, "perplexity": quantizer.perplexity}


class Autoencoder(nn.Module):
    """Encoder, codebook and decoder.

    Images are (B, C, H, W) float in [-1, 1]; codes are (B, h, w) int64 in [0, codebook_size).

    Args:
        config: its shape.
        z_channels: what the encoder gives and the decoder takes.
        stem_channels: of the encoder's first convolution.
        middle_attention: whether the blocks at the lowest resolution attend.
        quantizer: options of its `VectorQuantize`.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        *,
        z_channels: int,
        stem_channels: int,
        middle_attention: bool,
        quantizer: dict[str, Any],
    ):
        super().__init__()
        self.config = c = config
        shared = dict(
            blocks=c.num_res_blocks, middle_attention=middle_attention, dropout=c.dropout, groups=c.norm_groups
        )
        self.encoder = Encoder(c.in_channels, stem_channels, c.widths, z_channels, attention=c.attends, **shared)
        self.quantizer = VectorQuantize(c.code_dim, c.codebook_size, accept_image_fmap=True, **quantizer)
        self.decoder = Decoder(z_channels, c.widths[::-1], c.in_channels, attention=c.attends[::-1], **shared)
        if c.freeze_encoder:
            self.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "Autoencoder":
        """As of any module, but a frozen encoder keeps to evaluation: its dropout would move what it gives."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the vectors to quantise, (B, code_dim, h, w).

        Raises:
            TypeError: images that are not float.
            ValueError: images of another shape than the configuration's.
        """
        check_images(images, self.config)
        return self.encoder(images)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to codes (B, h, w)."""
        return self.quantizer(self.features(images), freeze_codebook=True)[1]

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) to images (B, C, H, W), about [-1, 1], not clipped.

        Raises:
            TypeError, ValueError: another dtype or shape, or a code that is none.
        """
        check_indices(codes, self.config.codebook_size, name="codes")
        if codes.ndim != 3:
            raise ValueError(f"codes: expected shape (B, h, w), got {describe(codes)}")
        return self._decode(self.quantizer.get_codes_from_indices(codes))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images through the codes and back: (B, C, H, W)."""
        return self.decode_codes(self.encode(images))

    @torch.no_grad()
    def evaluation_pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images of a batch and what is left of them after the codes: each (B, C, H, W)."""
        images = entry(batch, "image", self)
        return {"image": images, "reconstruction": self.reconstruct(images)}

    def histograms(self) -> dict[str, Tensor]:
        """Moving-average count of each code, (K,), under "codebook"."""
        return {"codebook": self.quantizer.cluster_size}

    def _decode(self, quantized: Tensor) -> Tensor:
        return self.decoder(quantized)
