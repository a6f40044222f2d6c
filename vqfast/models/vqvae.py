"""VQ-VAE: images to a small grid of codes and back (van den Oord et al. 2017, in VQGAN's blocks)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.nn.blocks import Downsample, Upsample, group_norm, levels, middle
from vqfast.nn.vector_quantize import VectorQuantize


@dataclass(frozen=True)
class VQVAEConfig:
    """Shape of a VQ-VAE. The code grid has image_size / 2^(len(mults) - 1) codes a side."""

    image_size: int = 32
    """Side of the square images, in pixels."""
    in_channels: int = 3
    """1 for grey images, 3 for RGB."""
    channels: int = 64
    """Base width; a multiple of 32."""
    mults: tuple[int, ...] = (1, 2, 2)
    """Width of each level as a multiple of the base; each level after the first halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks a level."""
    attention_resolutions: tuple[int, ...] = ()
    """Resolutions (in pixels) at which positions attend to each other."""
    dropout: float = 0.0
    codebook_size: int = 512
    """Number of codes."""
    code_dim: int = 64
    """Size of a code."""
    decay: float = 0.99
    """Of the codebook's moving averages."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss."""
    threshold_ema_dead_code: float = 1.0
    """A code whose average count a batch falls below this is replaced; 0 never replaces any."""
    reconstruction_loss: str = "l2"
    """How images are compared: l2 or l1."""

    def __post_init__(self):
        # JSON gives lists back.
        object.__setattr__(self, "mults", tuple(self.mults))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        if not self.mults or min(self.mults) < 1:
            raise ValueError(f"mults: expected at least one multiple of at least 1, got {self.mults}")
        if self.image_size < self.downsampling or self.image_size % self.downsampling:
            raise ValueError(
                f"image_size: expected a multiple of {self.downsampling}, the pixels a side of a code with "
                f"mults {self.mults}, got {self.image_size}"
            )
        if self.reconstruction_loss not in ("l1", "l2"):
            raise ValueError(f"reconstruction_loss: expected 'l1' or 'l2', got {self.reconstruction_loss!r}")

    @property
    def downsampling(self) -> int:
        """Pixels a side for each code."""
        return 2 ** (len(self.mults) - 1)

    @property
    def grid_size(self) -> int:
        """Codes a side."""
        return self.image_size // self.downsampling


class VQVAE(nn.Module):
    """Encoder, codebook and decoder.

    Images are (B, C, H, W) float in [-1, 1]; codes are (B, h, w) int64 in [0, codebook_size).
    """

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        c = config
        widths = tuple(c.channels * m for m in c.mults)
        attends = tuple(c.image_size // 2**level in c.attention_resolutions for level in range(len(widths)))

        self.encoder_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.encoder_levels = levels((widths[0], *widths), c.num_res_blocks, attends, c.dropout)
        self.downsamples = nn.ModuleList(Downsample(width) for width in widths[:-1])
        self.encoder_out = nn.Sequential(
            middle(widths[-1], attends[-1], c.dropout),
            group_norm(widths[-1]),
            nn.SiLU(),
            nn.Conv2d(widths[-1], c.code_dim, 3, padding=1),
        )

        self.quantizer = VectorQuantize(
            c.code_dim,
            c.codebook_size,
            decay=c.decay,
            commitment_weight=c.commitment_weight,
            threshold_ema_dead_code=c.threshold_ema_dead_code,
            kmeans_init=True,
            accept_image_fmap=True,
        )

        up = widths[::-1]
        self.decoder_in = nn.Sequential(
            nn.Conv2d(c.code_dim, up[0], 3, padding=1), middle(up[0], attends[-1], c.dropout)
        )
        # One block more than the encoder, as in VQGAN: the decoder has the harder half.
        self.decoder_levels = levels((up[0], *up), c.num_res_blocks + 1, attends[::-1], c.dropout)
        self.upsamples = nn.ModuleList(Upsample(width) for width in up[:-1])
        self.decoder_out = nn.Sequential(group_norm(up[-1]), nn.SiLU(), nn.Conv2d(up[-1], c.in_channels, 3, padding=1))

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to codes (B, h, w)."""
        return self.quantizer(self._features(images), freeze_codebook=True)[1]

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) to images (B, C, H, W), about [-1, 1], not clipped."""
        return self._decode(self.quantizer.get_codes_from_indices(codes))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images through the codes and back: (B, C, H, W)."""
        return self.decode_codes(self.encode(images))

    def training_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Loss of one batch, and what to watch.

        Args:
            batch: {"image": (B, C, H, W) float in [-1, 1]}.
            step: not used.

        Returns:
            Scalars: loss = reconstruction + commitment (weighted), reconstruction, commitment, usage (share of
            the codes chosen in the last 100 batches), perplexity.
        """
        images = batch["image"]
        quantized, _, commitment = self.quantizer(self._features(images))
        output = self._decode(quantized).float()
        distance = F.mse_loss if self.config.reconstruction_loss == "l2" else F.l1_loss
        reconstruction = distance(output, images)
        return {
            "loss": reconstruction + commitment,
            "reconstruction": reconstruction.detach(),
            "commitment": commitment.detach(),
            "usage": self.quantizer.usage,
            "perplexity": self.quantizer.perplexity,
        }

    @torch.no_grad()
    def evaluation_pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images of a batch and what is left of them after the codes: each (B, C, H, W)."""
        return {"image": batch["image"], "reconstruction": self.reconstruct(batch["image"])}

    def histograms(self) -> dict[str, Tensor]:
        """Moving-average count of each code, (K,), under "codebook"."""
        return {"codebook": self.quantizer.cluster_size}

    def _features(self, images: Tensor) -> Tensor:
        size, channels = self.config.image_size, self.config.in_channels
        if images.ndim != 4 or images.shape[1:] != (channels, size, size):
            raise ValueError(f"images: expected (B, {channels}, {size}, {size}), got {tuple(images.shape)}")
        h = self.encoder_in(images)
        for level, blocks in enumerate(self.encoder_levels):
            h = blocks(h)
            if level < len(self.downsamples):
                h = self.downsamples[level](h)
        return self.encoder_out(h)

    def _decode(self, quantized: Tensor) -> Tensor:
        h = self.decoder_in(quantized)
        for level, blocks in enumerate(self.decoder_levels):
            h = blocks(h)
            if level < len(self.upsamples):
                h = self.upsamples[level](h)
        return self.decoder_out(h)
