"""`vqfast refit` and `vqfast prune`: codebooks in which codes are dead, rebuilt or cut."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from tqdm.auto import tqdm
from tyro.conf import Positional

from vqfast.cli.encoding import describe, encode, images_for
from vqfast.cli.options import OfImages, OnDevice, Training, check_out, pick_device
from vqfast.cli.perceptual import load_lpips
from vqfast.cli.training import check_same, checksum, start, train_on_images
from vqfast.cli.words import several
from vqfast.data import ImageBatches, ImageData
from vqfast.evaluate.evaluation import Judges, evaluate_reconstruction
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.refit import GENERATOR_WEIGHT, collect_vectors, prune_codebook, rebuild_codebook
from vqfast.models.registry import kind_of
from vqfast.models.vqgan import VQGAN
from vqfast.train import RunError, TrainConfig, create_run, load_autoencoder, open_run
from vqfast.train.checkpoint import newest_checkpoint, save_checkpoint
from vqfast.train.runs import write_json

FIGURES_FILE = "refit.json"
BATCH = 64


@dataclass(kw_only=True)
class Refit(Training):
    """Rebuild the codebook of a trained model so that all codes are used, and fine-tune its decoder (ReFiT)."""

    command: ClassVar[str] = "refit"

    run: Positional[Path]
    """Run of a VQ-VAE or VQGAN; stays as it is."""
    data: str
    """Images to fit to: see vqfast train vqvae."""
    out: Path
    """Folder of the new run, which also gets refit.json: the figures before, after the rebuild, and at the end."""
    codebook_size: int | None = None
    """Codes of the new codebook. Default: as many as now."""
    vectors: int = 20_000
    """Vectors to cluster, each of an image and a grid cell drawn at random; many more than codes."""
    iters: int = 100
    """Iterations of k-means."""
    disc_weight: float = GENERATOR_WEIGHT
    """VQGAN: fixed weight of the generator's loss."""
    lpips: tuple[Path, ...] = ()
    """VQGAN: see vqfast train vqgan."""
    training: TrainConfig = field(default_factory=lambda: TrainConfig(lr=2e-6, beta1=0.5, beta2=0.9, weight_decay=0.0))

    def execute(self) -> None:
        for name in ("iters", "codebook_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RunError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
        processes = start(self)
        if self.resume:  # before all that leads to the training is done anew
            check_same(open_run(self.out), "training", asdict(self.training))
        perceptual = load_lpips(self.lpips)
        model = load_autoencoder(self.run, pick_device(self.training.device))
        data = images_for(self.data, model)
        size = self.codebook_size or model.config.codebook_size
        if self.vectors < size:
            raise RunError(f"--vectors: expected many more than the {size} codes, got {self.vectors}")
        held_out = ImageBatches(data, "held-out")
        figures = {"before": evaluate_reconstruction(model, held_out, Judges(), progress=True)}
        rebuilt = self._rebuild(model, data, size)
        figures["rebuilt"] = evaluate_reconstruction(rebuilt, held_out, Judges(), progress=True)
        if isinstance(rebuilt, VQGAN):
            rebuilt.perceptual = perceptual

        refit = {"vectors": self.vectors, "iters": self.iters, "weights": _checksum(self.run)}
        tuned = train_on_images(self, rebuilt, data, processes, {"refit": refit})
        figures["after"] = evaluate_reconstruction(tuned, held_out, Judges(), progress=True)
        if processes.is_main_process:
            write_json(self.out / FIGURES_FILE, figures)
            for when, found in figures.items():
                print(f"{when:>8}: {_line(found)}")

    def _rebuild(self, model: Autoencoder, data: ImageData, size: int) -> Autoencoder:
        """The model with a new codebook: the same in every process, which all do the same."""
        device = next(model.parameters()).device
        images = ImageBatches(data)
        drawn = np.random.default_rng(self.training.seed).integers(len(images), size=self.vectors)
        batches = tqdm(np.array_split(drawn, -(-self.vectors // BATCH)), desc="collecting vectors", leave=False)
        cells = torch.Generator().manual_seed(self.training.seed)
        vectors = collect_vectors(model, (images[b]["image"].to(device) for b in batches), generator=cells)
        start = torch.Generator(device).manual_seed(self.training.seed)
        return rebuild_codebook(
            model, vectors, size, iters=self.iters, generator_weight=self.disc_weight, generator=start
        )


@dataclass(kw_only=True)
class Prune(OnDevice, OfImages):
    """Cut the codes that no image uses out of a trained model's codebook."""

    run: Positional[Path]
    """Run of a VQ-VAE or VQGAN; stays as it is."""
    data: str
    """Images whose codes to keep: see vqfast train vqvae."""
    out: Path
    """Folder of the new run, which also gets kept_codes.npy: the old index of each new code."""
    split: Literal["train", "held-out", "all"] = "all"

    def execute(self) -> None:
        check_out(self.out)
        model = load_autoencoder(self.run, pick_device(self.device))
        data = images_for(self.data, model)
        codes = encode(model, data, self.split)
        size = model.config.codebook_size
        pruned, kept = prune_codebook(model, torch.bincount(codes.flatten(), minlength=size))

        info: dict[str, Any] = {"model": asdict(pruned.config), "data": describe(data)}
        pruning = {"split": self.split, "codes": size, "weights": _checksum(self.run)}
        create_run(self.out, kind_of(pruned), info | {"prune": pruning})
        save_checkpoint(self.out, 0, pruned, pruned.state_dict(), {}, {})
        np.save(self.out / "kept_codes.npy", kept.cpu().numpy())
        print(f"{self.out}: kept {len(kept)} of {size} codes: all in use by {several(len(codes), 'image')}")


def _checksum(run: Path) -> int:
    return checksum(newest_checkpoint(run).path)


def _line(found: dict[str, Any]) -> str:
    return (
        f"{found['codebook_size']} codes, {found['codebook_usage_10']:.1%} of them used 10 times or more by "
        f"{found['images']} held-out images, PSNR {found['psnr_db']:.2f} dB"
    )
