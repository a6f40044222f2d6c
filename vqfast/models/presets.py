"""The configurations that the papers trained, by name."""

from dataclasses import dataclass
from typing import Any

import torch

from vqfast.models.registry import build


@dataclass(frozen=True)
class Preset:
    """A published model.

    kind: see vqfast.models.registry.
    config: values of its configuration that are not the defaults.
    source: the paper and what it trained on.
    """

    kind: str
    config: dict[str, Any]
    source: str

    def build(self, device: torch.device | str = "cpu") -> torch.nn.Module:
        """The model with fresh weights; on device "meta" it takes no memory."""
        with torch.device(device):
            return build(self.kind, self.config)

    @property
    def parameters(self) -> int:
        """Number of parameters, counted on the meta device."""
        return sum(p.numel() for p in self.build("meta").parameters())


_VQGAN = "VQGAN (Esser et al. 2021), with its discriminator: ImageNet"
_DQVAE = "DQ-VAE (arXiv 2305.11718), with its discriminator: ImageNet"
_DQ = "DQ-Transformer (arXiv 2305.11718)"
_VQDDM = "VQ-DDM (arXiv 2112.01799)"

_TRIPLE = {"grains": 3, "mults": (1, 1, 2, 2, 4, 4), "attention_resolutions": (8, 16, 32)}

PRESETS: dict[str, Preset] = {
    "vqgan-f16-1024": Preset("vqgan", {}, f"{_VQGAN}, 16x16 codes of 1024"),
    "vqgan-f16-16384": Preset("vqgan", {"codebook_size": 16384}, f"{_VQGAN}, 16x16 codes of 16384"),
    "dqvae-dual": Preset("dqvae", {}, f"{_DQVAE}, 256 to 1024 codes, half of the cells fine"),
    "dqvae-triple": Preset("dqvae", _TRIPLE, f"{_DQVAE}, 64 to 1024 codes, 0.3 of the cells fine, 0.3 median"),
    "dqvae-entropy": Preset("dqvae", {"router": "entropy"}, f"{_DQVAE}, 256 to 1024 codes, by entropy"),
    "dq-transformer-base": Preset("dq_transformer", {}, f"{_DQ}, base, FFHQ"),
    "dq-transformer-base-class": Preset("dq_transformer", {"num_classes": 1000}, f"{_DQ}, base, ImageNet"),
    "raster-gpt-base": Preset("raster_gpt", {}, f"the baseline at the size of {_DQ}, base"),
    "vqddm-512": Preset("vqddm", {"codebook_size": 512}, f"{_VQDDM}, 16x16 codes of 512"),
    "vqddm-1024": Preset("vqddm", {"codebook_size": 1024}, f"{_VQDDM}, 16x16 codes of 1024"),
}
