"""`vqfast convert`: checkpoints of released code as runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from tyro.conf import Positional

from vqfast.cli.options import check_out
from vqfast.cli.training import AUTOENCODER, copy_autoencoder
from vqfast.models.converters import (
    dqvae_config,
    dqvae_state_dict,
    vqddm_config,
    vqddm_state_dict,
    vqgan_config,
    vqgan_state_dict,
)
from vqfast.models.dqvae import DQVAE
from vqfast.models.registry import kind_of
from vqfast.models.vqddm import VQDDM
from vqfast.models.vqgan import VQGAN
from vqfast.train import RunError, create_run, load_autoencoder
from vqfast.train.checkpoint import newest_checkpoint, save_checkpoint
from vqfast.train.foreign import read_weights


@dataclass
class ConvertTaming:
    """A VQGAN of taming-transformers, or of VQ-DDM's ReFiT."""

    checkpoint: Positional[Path]
    """The .ckpt, .pt, .pth or .safetensors file."""
    out: Path
    """Folder of the run; made, and never overwritten."""
    image_size: int = 256
    """Side in pixels of the images that it was trained on; the file does not tell."""

    def execute(self) -> None:
        check_out(self.out)
        with _blaming(self.checkpoint):
            weights = read_weights(self.checkpoint)
            model = VQGAN(vqgan_config(weights, self.image_size))
            model.load_state_dict(vqgan_state_dict(weights, self.image_size))
        _save(self.out, model, {"source": str(self.checkpoint)})
        c = model.config
        print(f"{self.out}: a VQGAN of {c.codebook_size} codes, {c.grid_size}x{c.grid_size} for {c.image_size} pixels")


@dataclass
class ConvertVQDDM:
    """A denoiser of VQ-DDM's released code."""

    checkpoint: Positional[Path]
    """The .ckpt, .pt, .pth or .safetensors file."""
    autoencoder: Path
    """Run of the autoencoder whose codes it was trained on: see vqfast convert taming."""
    out: Path
    """Folder of the run; made, and never overwritten."""
    parameterisation: Literal["x0", "residual"] = "x0"
    """x0 for CelebA and LSUN; residual for ImageNet, whose network predicts the noise. The file does not tell."""

    def execute(self) -> None:
        check_out(self.out)
        autoencoder = load_autoencoder(self.autoencoder).config
        with _blaming(self.checkpoint):
            weights = read_weights(self.checkpoint)
            grid = (autoencoder.grid_size,) * 2
            config = vqddm_config(weights, grid=grid, parameterisation=self.parameterisation)
            if config.codebook_size != autoencoder.codebook_size:
                raise RunError(
                    f"made for {config.codebook_size} codes, but {self.autoencoder} has {autoencoder.codebook_size}"
                )
            model = VQDDM(config)
            model.load_state_dict(vqddm_state_dict(weights, config))
        _save(self.out, model, {"source": str(self.checkpoint)})
        copy_autoencoder(self.autoencoder, newest_checkpoint(self.autoencoder).path, self.out / AUTOENCODER)
        print(f"{self.out}: a VQ-DDM of {config.codebook_size} codes, {config.T} noise levels")


@dataclass
class ConvertDQVAE:
    """A DQ-VAE of its released code: two or three grains, feature or entropy router."""

    checkpoint: Positional[Path]
    """The .ckpt, .pt, .pth or .safetensors file."""
    out: Path
    """Folder of the run; made, and never overwritten."""

    def execute(self) -> None:
        check_out(self.out)
        with _blaming(self.checkpoint):
            weights = read_weights(self.checkpoint)
            model = DQVAE(dqvae_config(weights))
            model.load_state_dict(dqvae_state_dict(weights))
        _save(self.out, model, {"source": str(self.checkpoint)})
        c = model.config
        cells, most = c.grid_size**2, c.fine_grid_size**2
        print(f"{self.out}: a DQ-VAE of {c.codebook_size} codes, {cells} to {most} of them for {c.image_size} pixels")


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise error if str(error).startswith(str(path)) else RunError(f"{path}: {error}") from error


def _save(out: Path, model: nn.Module, info: dict[str, Any]) -> None:
    create_run(out, kind_of(model), {"model": asdict(model.config)} | info)
    save_checkpoint(out, 0, model, model.state_dict(), {}, {})
