"""`vqfast compare vqddm`: discrete diffusion against raster order, at equal parameters and equal training time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqfast.cli.bench import Make
from vqfast.cli.comparison_results import save_samples
from vqfast.cli.encoding import describe
from vqfast.cli.options import check_out, pick_device
from vqfast.cli.sizes import halvings
from vqfast.cli.timed import TimedComparison
from vqfast.cli.train_vqvae import TrainVQVAE
from vqfast.cli.vqddm_bench import VQDDMBench
from vqfast.cli.vqddm_results import save_inpaintings, write_vqddm_results
from vqfast.data import DataError
from vqfast.evaluate.equal_size import raster_equal
from vqfast.evaluate.global_context import judge
from vqfast.models.autoencoder import AutoencoderConfig
from vqfast.models.raster_gpt import RasterGPT
from vqfast.models.vqddm import VQDDM, VQDDMConfig
from vqfast.train import create_run, load_autoencoder

DIFFUSION, RASTER = "VQ-DDM", "raster transformer"


@dataclass(kw_only=True)
class CompareVQDDM(TimedComparison):
    """Train a VQ-DDM and a raster-order transformer on the same codes for the same time, and judge VQ-DDM's claims."""

    out: Path
    """Folder to make: results.json, results.md, samples.png, inpainting_centre.png, inpainting_random.png."""
    vqvae: Path | None = None
    """Run of a VQ-VAE or VQGAN. Default: a small VQ-VAE is trained, in --out."""
    vqvae_steps: int = 700
    """Without --vqvae: its training steps."""
    vqvae_channels: int = 32
    """Without --vqvae: its base width."""
    steps: tuple[int, ...] = (50, 10, 25, 100)
    """Denoising steps of the VQ-DDM's samples; the claims are judged with the first number, all are shown."""
    denoiser: Literal["transformer", "unet"] = "transformer"
    """The VQ-DDM's network."""
    dim: int = 64
    """Its width; the raster-order transformer's is chosen so that both have as many parameters."""
    depth: int = 4
    """Its blocks."""
    timesteps: int = 100
    """Its noise levels T."""
    told: bool = False
    """Tell both models the class of what they inpaint. Default: they have to see it."""

    def execute(self) -> None:
        check_out(self.out)
        self.check()
        if not self.steps or not all(1 <= steps <= self.timesteps for steps in self.steps):
            raise DataError(f"--steps: expected numbers in 1..{self.timesteps} (--timesteps), got {self.steps}")
        device = pick_device(self.device)
        given = None if self.vqvae is None else load_autoencoder(self.vqvae, device)
        data = self.images(given)
        # Its settings are those of the demo.
        small = self.small(
            TrainVQVAE, "vqvae", self.vqvae_steps, channels=self.vqvae_channels, dropout=0.1, code_dim=16
        )
        config = given.config if given else small.model(data.image_size[0], data.channels).config
        models = self._models(config, len(data.classes))

        create_run(self.out, "compare_vqddm", {"data": describe(data), "settings": self.settings("vqvae")})
        if not given:
            small.execute()
        bench = VQDDMBench(self, data, given or load_autoencoder(small.out, device))
        trained = bench.train(models)
        claims = judge(*trained.values(), bench.real_features, resamples=self.resamples, seed=self.seed)
        save_samples(self.out, bench, trained, "Samples of discrete diffusion and of raster order")
        save_inpaintings(self.out, bench, trained)
        write_vqddm_results(self.out, bench, models, trained, claims)

    def _models(self, autoencoder: AutoencoderConfig, num_classes: int) -> dict[str, Make]:
        """What claims to be better, and what it is compared with."""
        grid = autoencoder.grid_size
        diffusion = VQDDMConfig(
            codebook_size=autoencoder.codebook_size,
            grid=(grid, grid),
            denoiser=self.denoiser,
            dim=self.dim,
            mults=halvings(grid),
            depth=self.depth,
            heads=self.heads,
            T=self.timesteps,
            num_classes=num_classes,
        )
        return {DIFFUSION: (VQDDM, diffusion), RASTER: (RasterGPT, raster_equal(VQDDM, diffusion, self.depth))}
