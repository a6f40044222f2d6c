"""VQGAN: a VQ-VAE whose images must also please a discriminator and a perceptual loss (Esser et al. 2021)."""

from dataclasses import dataclass

from torch import Tensor, nn

from vqfast.models.adversarial import Adversarial, AdversarialConfig
from vqfast.models.autoencoder import Autoencoder, AutoencoderConfig, check_sizes, codebook_scalars
from vqfast.nn.perceptual import LPIPS


@dataclass(frozen=True)
class VQGANConfig(AutoencoderConfig, AdversarialConfig):
    """Shape of a VQGAN and how it learns. The defaults are the published model for ImageNet at 256 pixels, f = 16."""

    image_size: int = 256
    """Side of the square images, in pixels."""
    channels: int = 128
    """Base width; a multiple of norm_groups."""
    mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width of each level as a multiple of the base; each level after the first halves the resolution."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Resolutions (in pixels) at which positions attend to each other; the middle blocks always do."""
    codebook_size: int = 1024
    """Number of codes."""
    code_dim: int = 256
    """Size of a code."""
    z_channels: int = 256
    """Width of the encoder's output and the decoder's input; 1 x 1 convolutions lead to the codes and back."""
    commitment_weight: float = 0.25
    """beta: weight of the commitment term against that of the codebook, which is 1."""
    legacy_loss: bool = False
    """Put beta on the codebook's term and 1 on the commitment, as the released code does unless told otherwise."""
    codebook_weight: float = 1.0
    """Weight of both of these terms in the loss."""

    def __post_init__(self):
        AutoencoderConfig.__post_init__(self)
        AdversarialConfig.__post_init__(self)
        check_sizes(self, "z_channels")
        if self.codebook_weight < 0:
            raise ValueError(f"codebook_weight: expected at least 0, got {self.codebook_weight}")


class VQGAN(Adversarial, Autoencoder):
    """Encoder, learned codebook, decoder, and the discriminator that they are trained against.

    With config.freeze_encoder the encoder and the convolution after it are as they are (ReFiT).

    Args:
        config: the model's make.
        perceptual: LPIPS with its weights, or None. Not part of the state dict.

    Raises:
        ValueError: a configuration that does not fit together.
    """

    def __init__(self, config: VQGANConfig, perceptual: LPIPS | None = None):
        commitment, codebook = config.commitment_weight, 1.0
        if config.legacy_loss:
            commitment, codebook = codebook, commitment
        super().__init__(
            config,
            z_channels=config.z_channels,
            stem_channels=config.channels,
            middle_attention=True,
            quantizer=dict(decay=None, commitment_weight=commitment, codebook_weight=codebook),
        )
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)
        if config.freeze_encoder:
            self.quant_conv.requires_grad_(False)
        self._add_judges(perceptual)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the vectors to quantise, (B, code_dim, h, w)."""
        return self.quant_conv(super().features(images))

    def _decode(self, quantized: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(quantized))

    def _model_step(self, images: Tensor, step: int) -> dict[str, Tensor]:
        quantized, _, codebook = self.quantizer(self.features(images))
        terms = self._image_terms(images, self._decode(quantized).float(), step)
        return {
            "loss": terms.loss + self.config.codebook_weight * codebook,
            **terms.scalars,
            **codebook_scalars(self.quantizer, codebook=codebook),
        }
