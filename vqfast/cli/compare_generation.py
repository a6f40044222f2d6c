"""`vqfast compare generation`: coarse to fine against raster order, at equal parameters and equal training time."""

from dataclasses import dataclass
from pathlib import Path

from vqfast.cli.bench import Make
from vqfast.cli.comparison_results import save_samples
from vqfast.cli.encoding import describe
from vqfast.cli.generation_bench import GenerationBench
from vqfast.cli.generation_results import save_drawn_grains, write_generation_results
from vqfast.cli.options import check_out, pick_device
from vqfast.cli.sizes import cell_mults
from vqfast.cli.timed import TimedComparison
from vqfast.cli.train_dqvae import TrainDQVAE
from vqfast.evaluate.equal_size import raster_equal
from vqfast.evaluate.generation import judge_samples
from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.dqvae import DQVAEConfig
from vqfast.models.raster_gpt import RasterGPT
from vqfast.train import create_run, load_model

COARSE_TO_FINE, RASTER = "DQ-Transformer", "raster transformer"


@dataclass(kw_only=True)
class CompareGeneration(TimedComparison):
    """Train a DQ-Transformer and a raster-order transformer on the codes of one DQ-VAE for the same time, and judge
    DQ-Transformer's claims."""

    out: Path
    """Folder to make: results.json, results.md, samples.png, grains.png."""
    dqvae: Path | None = None
    """Run of a DQ-VAE. Default: a small one, whose cells get their codes by entropy, is trained in --out."""
    dqvae_steps: int = 400
    """Without --dqvae: its training steps."""
    dqvae_channels: int = 32
    """Without --dqvae: its base width."""
    minutes: float = 1.0
    """Time of each training."""
    batch_size: int = 16
    """Images a training step."""
    lr: float = 3e-3
    """Highest learning rate of both models."""
    dim: int = 64
    """Width of the DQ-Transformer; the raster-order transformer's is chosen so that both have as many parameters."""
    position_depth: int = 1
    """Blocks of its position stack."""
    content_depth: int = 3
    """Blocks of its content stack."""

    def execute(self) -> None:
        check_out(self.out)
        self.check()
        device = pick_device(self.device)
        given = None if self.dqvae is None else load_model(self.dqvae, "dqvae", device)
        data = self.images(given)
        small = self.small(
            TrainDQVAE, "dqvae", self.dqvae_steps,
            channels=self.dqvae_channels, mults=cell_mults(data.image_size[0]), attention_resolutions=(), code_dim=32,
            z_channels=32, router="entropy", perceptual_weight=0.0, disc_weight=0.0,
        )  # fmt: skip
        config = given.config if given else small.model(data.image_size[0], data.channels).config
        models = self._models(config, len(data.classes))

        create_run(self.out, "compare_generation", {"data": describe(data), "settings": self.settings("dqvae")})
        if not given:
            small.execute()
        bench = GenerationBench(self, data, given or load_model(small.out, "dqvae", device))
        trained = bench.train(models)
        claims = judge_samples(*trained.values(), bench.real_features, resamples=self.resamples, seed=self.seed)
        save_samples(self.out, bench, trained, "Samples coarse to fine and in raster order")
        save_drawn_grains(self.out, bench, COARSE_TO_FINE, trained[COARSE_TO_FINE][0].judged)
        write_generation_results(self.out, bench, models, trained, claims)

    def _models(self, autoencoder: DQVAEConfig, num_classes: int) -> dict[str, Make]:
        """What claims to be better, and what it is compared with."""
        dynamic = DQTransformerConfig(
            codebook_size=autoencoder.codebook_size,
            grid=(autoencoder.fine_grid_size,) * 2,
            num_grains=autoencoder.grains,
            dim=self.dim,
            heads=self.heads,
            position_depth=self.position_depth,
            content_depth=self.content_depth,
            max_length=None,
            num_classes=num_classes,
        )
        raster = raster_equal(DQTransformer, dynamic, self.position_depth + self.content_depth)
        return {COARSE_TO_FINE: (DQTransformer, dynamic), RASTER: (RasterGPT, raster)}
