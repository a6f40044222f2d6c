"""VQ-VAE: images to a small grid of codes and back (van den Oord et al. 2017, in VQGAN's blocks)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vqfast.models.autoencoder import Autoencoder, AutoencoderConfig, codebook_scalars
from vqfast.models.batch import entry


@dataclass(frozen=True)
class VQVAEConfig(AutoencoderConfig):
    """Shape of a VQ-VAE and how it learns."""

    decay: float = 0.99
    """Of the codebook's moving averages."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss."""
    threshold_ema_dead_code: float = 1.0
    """A code whose average count a batch falls below this is replaced; 0 never replaces any."""
    reconstruction_loss: str = "l2"
    """How images are compared: l2 or l1."""

    def __post_init__(self):
        super().__post_init__()
        if self.reconstruction_loss not in ("l1", "l2"):
            raise ValueError(f"reconstruction_loss: expected 'l1' or 'l2', got {self.reconstruction_loss!r}")


class VQVAE(Autoencoder):
    """Encoder, codebook kept by moving averages, decoder."""

    def __init__(self, config: VQVAEConfig):
        super().__init__(
            config,
            z_channels=config.code_dim,
            stem_channels=config.widths[0],
            middle_attention=config.attends[-1],
            quantizer=dict(
                decay=config.decay,
                commitment_weight=config.commitment_weight,
                threshold_ema_dead_code=config.threshold_ema_dead_code,
                kmeans_init=True,
            ),
        )
        self.register_load_state_dict_pre_hook(_rename_first_checkpoints)

    def training_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Loss of one batch, and what to watch.

        Args:
            batch: {"image": (B, C, H, W) float in [-1, 1]}.
            step: not used.

        Returns:
            Scalars: loss = reconstruction + commitment (weighted), reconstruction; in training mode also commitment,
            usage (share of the codes chosen in the last 100 batches), perplexity.
        """
        images = entry(batch, "image", self)
        quantized, _, commitment = self.quantizer(self.features(images))
        output = self._decode(quantized).float()
        distance = F.mse_loss if self.config.reconstruction_loss == "l2" else F.l1_loss
        reconstruction = distance(output, images)
        return {
            "loss": reconstruction + commitment,
            "reconstruction": reconstruction.detach(),
            **codebook_scalars(self.quantizer, commitment=commitment),
        }


# Checkpoints of version 0.1.0 were written before encoder and decoder were modules of their own.
_FIRST_NAMES = {
    "encoder_in.": "encoder.conv_in.",
    "encoder_levels.": "encoder.levels.",
    "downsamples.": "encoder.downsamples.",
    "encoder_out.0.": "encoder.middle.",
    "encoder_out.1.": "encoder.norm_out.",
    "encoder_out.3.": "encoder.conv_out.",
    "decoder_in.0.": "decoder.conv_in.",
    "decoder_in.1.": "decoder.middle.",
    "decoder_levels.": "decoder.levels.",
    "upsamples.": "decoder.upsamples.",
    "decoder_out.0.": "decoder.norm_out.",
    "decoder_out.2.": "decoder.conv_out.",
}


def _rename_first_checkpoints(module, state_dict, prefix, *_) -> None:
    for name in list(state_dict):
        for first, now in _FIRST_NAMES.items():
            if name.startswith(prefix + first):
                state_dict[prefix + now + name.removeprefix(prefix + first)] = state_dict.pop(name)
                break
