"""`vqfast train vqddm`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vqfast.cli.encoding import BATCH
from vqfast.cli.options import config_from
from vqfast.cli.sizes import halvings
from vqfast.cli.train_codes import CodeTraining
from vqfast.data import CodeBatches
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.vqddm import VQDDM, VQDDMConfig, smoothed_frequencies
from vqfast.ops import embedding_neighbours
from vqfast.train import TrainConfig

PREVIEW_STEPS = 50  # denoising steps of the samples that are drawn during training


@dataclass(kw_only=True)
class TrainVQDDM(CodeTraining):
    """Train a VQ-DDM: discrete diffusion on the codes that a trained VQ-VAE gives to images."""

    command: ClassVar[str] = "train vqddm"
    derived: ClassVar[tuple[str, ...]] = ("marginal", "nearest")

    vqvae: Path
    """Run of the VQ-VAE or VQGAN."""
    denoiser: Literal["unet", "transformer"] = "unet"
    """Network that predicts the clean codes."""
    dim: int = 128
    """Base width of the network."""
    mults: tuple[int, ...] | None = None
    """U-Net: width of each level as a multiple of the base. Default: chosen by the code grid."""
    depth: int = 12
    """Transformer: number of blocks."""
    heads: int = 8
    """Transformer: attention heads."""
    timesteps: int = 1000
    """Noise levels T."""
    transition: Literal["uniform", "absorbing", "mask_and_replace", "marginal", "gaussian", "nearest"] = "uniform"
    """What noise does to a code: puts any other in its place, hides it, or some of both; puts others in its place as
    often as images have them (marginal), those close in number (gaussian), or those close in the codebook (nearest)."""
    schedule: Literal["cosine", "cosine_released", "linear", "reciprocal", "vq_diffusion"] = "cosine"
    """How the noise grows with the level. vq_diffusion: of mask_and_replace, as that paper's code has it."""
    mask_share: float = 0.9
    """mask_and_replace: share of the noise that hides."""
    betas: tuple[float, float] | None = None
    """gaussian, in place of --schedule: width of the first and the last step. Default: 0.1 and 20, over T."""
    neighbours: int = 8
    """nearest: how many codes close to it each code has."""
    rule: Literal["joint", "marginal"] = "joint"
    """Of the reverse step, in training and sampling: D3PM's and multinomial diffusion's, or VQ-Diffusion's."""
    aux_weight: float = 0.0
    """Weight of the cross-entropy of the clean codes beside the variational bound."""
    aux_schedule: Literal["constant", "adaptive"] = "constant"
    """Whether that weight is the same at every level, or falls from twice at the first to once at the last."""
    weighting: Literal["elbo", "reweighted"] = "elbo"
    """Of the levels in the loss: the bound itself, or the reweighted bound."""
    parameterisation: Literal["x0", "residual"] = "x0"
    """What the network gives: logits of the clean codes, or what is added to the one-hot of noisy ones (the noise)."""
    time_sampling: Literal["importance", "uniform"] = "importance"
    """How levels are drawn: those of large loss more often, or each alike."""
    training: TrainConfig = field(default_factory=lambda: TrainConfig(ema_decay=0.999))

    def model(self, autoencoder: Autoencoder, num_classes: int | None) -> VQDDM:
        size = autoencoder.config.grid_size
        config = config_from(
            self,
            VQDDMConfig,
            codebook_size=autoencoder.config.codebook_size,
            grid=(size, size),
            mults=self.mults or halvings(size),
            T=self.timesteps,
            num_classes=num_classes,
            **self._noise(autoencoder),
        )
        return VQDDM(config)

    def _noise(self, autoencoder: Autoencoder) -> dict[str, Any]:
        """What the configuration says of the family chosen."""
        K, T = autoencoder.config.codebook_size, self.timesteps
        settings: dict[str, Any] = {"betas": VQDDMConfig.betas, "neighbours": None}
        if self.transition == "marginal":
            settings["marginal"] = (1 / K,) * K  # until the codes are there
        if self.transition == "gaussian":
            settings["betas"] = self.betas or (0.1 / T, 20 / T)
        if self.transition == "nearest":
            nearest = embedding_neighbours(autoencoder.quantizer.codebook, self.neighbours)
            settings |= {"neighbours": self.neighbours, "nearest": nearest.tolist()}
        return settings

    def fitted(self, model: VQDDM, codes: CodeBatches) -> VQDDM:
        if self.transition != "marginal":
            return model
        K = model.config.codebook_size
        parts = torch.arange(len(codes)).split(BATCH)
        counts = sum(torch.bincount(codes[part.numpy()]["codes"].flatten(), minlength=K) for part in parts)
        return VQDDM(replace(model.config, marginal=smoothed_frequencies(counts)))

    def draw(self, model: VQDDM, n: int, labels: Tensor | None) -> Tensor:
        return model.sample(n, labels, steps=min(model.config.T, PREVIEW_STEPS))
