"""`vqfast compare vqddm`: discrete diffusion against raster order, at equal parameters and equal training time."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from vqfast.cli.encoding import check_channels, describe
from vqfast.cli.options import OnDevice, check_out, pick_device
from vqfast.cli.sizes import halvings, mults_for
from vqfast.cli.timed import TimedComparison
from vqfast.cli.train_autoencoder import square_images
from vqfast.cli.train_vqvae import TrainVQVAE
from vqfast.cli.vqddm_bench import MASKS, Bench
from vqfast.cli.vqddm_results import write_results
from vqfast.data import DataError
from vqfast.evaluate.figures import hide, save_grid
from vqfast.evaluate.global_context import (
    Trained,
    judge,
    parameter_count,
    raster_equal,
)
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.raster_gpt import RasterGPT
from vqfast.models.vqddm import VQDDM, VQDDMConfig
from vqfast.train import TrainConfig, create_run, load_autoencoder

SHOWN = 16
DIFFUSION, RASTER = "VQ-DDM", "raster transformer"


@dataclass(kw_only=True)
class CompareVQDDM(TimedComparison, OnDevice):
    """Train a VQ-DDM and a raster-order transformer on the same codes for the same time, and judge VQ-DDM's claims."""

    out: Path
    """Folder to make: results.json, results.md, samples.png, inpainting_centre.png, inpainting_random.png."""
    vqvae: Path | None = None
    """Run of a VQ-VAE or VQGAN. Default: a small VQ-VAE is trained, in --out."""
    image_size: int | None = None
    """Without --vqvae: resize images to this many pixels a side. Default: their own size."""
    vqvae_steps: int = 700
    """Without --vqvae: its training steps."""
    vqvae_channels: int = 32
    """Without --vqvae: its base width."""
    codebook_size: int = 128
    """Without --vqvae: its number of codes."""
    minutes: float = 0.5
    """Time of each training."""
    seeds: int = 3
    """Trainings of each model."""
    n: int = 500
    """Images to draw from each training."""
    held_out: int = 500
    """Held-out images to measure on, at most."""
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
    resamples: int = 300
    """Of the bootstrap that tells how sure a claim is."""
    seed: int = 0
    """Of weights, order of images, masks and noise."""

    def execute(self) -> None:
        check_out(self.out)
        self.check(seeds=1, held_out=2, resamples=2)
        if not self.steps or not all(1 <= steps <= self.timesteps for steps in self.steps):
            raise DataError(f"--steps: expected numbers in 1..{self.timesteps} (--timesteps), got {self.steps}")
        device = pick_device(self.device)
        given = None if self.vqvae is None else load_autoencoder(self.vqvae, device)
        data = square_images(self.data, given.config.image_size if given else self.image_size)
        if given:
            check_channels(data, given.config.in_channels)
        self.check_images(data)
        grid = given.config.grid_size if given else data.image_size[0] // 2 ** (len(mults_for(data.image_size[0])) - 1)
        diffusion = VQDDMConfig(
            codebook_size=given.config.codebook_size if given else self.codebook_size,
            grid=(grid, grid),
            denoiser=self.denoiser,
            dim=self.dim,
            mults=halvings(grid),
            depth=self.depth,
            heads=self.heads,
            T=self.timesteps,
            num_classes=len(data.classes),
        )
        raster = raster_equal(diffusion)

        info = {"data": describe(data), "settings": self.settings("vqvae")}
        out = create_run(self.out, "compare_vqddm", info).path
        autoencoder = given or self._train_autoencoder(out / "vqvae", device)
        bench = Bench(self, data, autoencoder, device)
        trained: dict[str, list[Trained]] = {DIFFUSION: [], RASTER: []}
        for seed in range(self.seed, self.seed + self.seeds):
            for name, model_class, config in ((DIFFUSION, VQDDM, diffusion), (RASTER, RasterGPT, raster)):
                torch.manual_seed(seed)
                trained[name].append(bench.train_and_measure(name, model_class(config).to(device), seed))
        claims = judge(
            trained[DIFFUSION], trained[RASTER], self._ways()[0], RASTER, bench.real_features,
            resamples=self.resamples, seed=self.seed,
        )  # fmt: skip
        models = {
            DIFFUSION: {"parameters": parameter_count(VQDDM, diffusion), "config": asdict(diffusion)},
            RASTER: {"parameters": parameter_count(RasterGPT, raster), "config": asdict(raster)},
        }
        write_results(out, bench, trained, claims, models)
        self._draw(out, bench, trained)
        print("\n".join(f"{claim.verdict:>9}: {claim.text} ({claim.figures('resamples')})" for claim in claims))
        print(
            f"{out}: compared {self.seeds} trainings of each model, of {models[DIFFUSION]['parameters']} (VQ-DDM) "
            f"and {models[RASTER]['parameters']} (raster) parameters; see results.md"
        )

    def _ways(self) -> list[str]:
        return [f"{DIFFUSION}, {steps} steps" for steps in self.steps]

    def _train_autoencoder(self, out: Path, device: torch.device) -> Autoencoder:
        """With the settings of the demo."""
        TrainVQVAE(
            data=self.data,
            out=out,
            image_size=self.image_size,
            channels=self.vqvae_channels,
            num_res_blocks=1,
            dropout=0.1,
            codebook_size=self.codebook_size,
            code_dim=16,
            training=TrainConfig(
                steps=self.vqvae_steps, batch_size=64, lr=2e-3, warmup=50, device=self.device, seed=self.seed
            ),
        ).execute()
        return load_autoencoder(out, device)

    def _draw(self, out: Path, bench: Bench, trained: dict[str, list[Trained]]) -> None:
        """Pictures of the first training of each model; what is shown was not chosen."""
        first = {name: trainings[0] for name, trainings in trained.items()}
        way = self._ways()[0]
        save_grid(
            out / "samples.png",
            [
                bench.real[:SHOWN],
                first[DIFFUSION].samples[way].images[:SHOWN],
                first[RASTER].samples[RASTER].images[:SHOWN],
            ],
            title="Samples of discrete diffusion and of raster order",
            subtitle=f"{60 * self.minutes:g} seconds of training each; classes in turn",
            labels=["held out", way, RASTER],
        )
        for mask in MASKS:
            save_grid(
                out / f"inpainting_{mask}.png",
                [
                    bench.real[:SHOWN],
                    hide(bench.real, bench.hidden(mask, self.seed)[1])[:SHOWN],
                    *(trainings.inpaintings[mask].images[:SHOWN] for trainings in first.values()),
                ],
                title=f"Inpainting, mask: {mask}",
                subtitle="the class is told" if self.told else "the class is not told",
                labels=["truth", "given", *first],
            )
