"""`vqfast compare vqddm`: discrete diffusion against raster order, at equal parameters and equal training time."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vqfast.cli.encoding import check_channels, decode, describe, encode, labels_at, labels_of
from vqfast.cli.generators import noise
from vqfast.cli.masks import codes_around, hidden_cells, hidden_pixels
from vqfast.cli.options import OnDevice, check_out, pick_device
from vqfast.cli.sheets import spread
from vqfast.cli.sizes import halvings, mults_for
from vqfast.cli.timed import TimedComparison
from vqfast.cli.train_autoencoder import square_images
from vqfast.cli.train_vqvae import TrainVQVAE
from vqfast.data import CodeBatches, DataError, ImageData
from vqfast.evaluate.claims import Claim, table
from vqfast.evaluate.figures import hide, save_grid
from vqfast.evaluate.frechet import frechet_distance
from vqfast.evaluate.global_context import (
    BATCH,
    Inpainting,
    Trained,
    held_out_bits,
    judge,
    measure_inpainting,
    measure_samples,
    parameter_count,
    raster_equal,
)
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.raster_gpt import RasterGPT
from vqfast.models.vqddm import VQDDM, VQDDMConfig
from vqfast.train import TrainConfig, create_run, load_autoencoder
from vqfast.train.runs import write_json

SHOWN = 16
MASKS = ("centre", "random")
DIFFUSION, RASTER = "VQ-DDM", "raster transformer"
BLIND = (
    "The raster transformer inpaints in raster order: codes that are given take their place in the sequence, each "
    "hidden one is drawn given all before it. It cannot see what is given further down; the VQ-DDM reads all of it."
)


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
        bench = _Bench(self, data, autoencoder, device)
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
        _write(out, bench, trained, claims, models)
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

    def _draw(self, out: Path, bench: "_Bench", trained: dict[str, list[Trained]]) -> None:
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


class _Bench:
    """What all trainings share: codes, held-out images, the classifier that judges.

    real: (N, H, W, C) uint8 held-out images, whose labels and classifier's features are beside them.
    """

    def __init__(self, command: CompareVQDDM, data: ImageData, autoencoder: Autoencoder, device: torch.device):
        self.command, self.autoencoder, self.device = command, autoencoder, device
        self.codes = encode(autoencoder, data, "train")
        self.batches = CodeBatches(self.codes, labels_of(data, "train"))
        unseen = spread(data.indices("held-out"), command.held_out)
        self.real, self.real_labels = data.images[unseen], labels_at(data, unseen)
        self.classifier = command.classifier(data)
        self.real_features = self.classifier.features_of(self.real)
        self.labels = torch.arange(command.n) % len(data.classes)
        grid = autoencoder.config.grid_size
        self.real_codes = self._codes_around(np.zeros(self.real.shape[:3], dtype=bool))
        self.held_out = CodeBatches(self.real_codes, self.real_labels)
        self.grid = (grid, grid)

    def hidden(self, mask: str, seed: int) -> tuple[Tensor, np.ndarray]:
        """True where codes (N, h, w) and pixels (N, H, W) of the held-out images are hidden."""
        cells = hidden_cells(mask, len(self.real), self.grid, seed)
        return cells, hidden_pixels(cells, self.autoencoder.config.downsampling)

    def train_and_measure(self, name: str, model: VQDDM | RasterGPT, seed: int) -> Trained:
        command = self.command
        steps = command.fit(f"{name}, seed {seed}", model, self.batches, seed)
        if isinstance(model, VQDDM):
            ways = {f"{name}, {count} steps": partial(model.sample, steps=count) for count in command.steps}
            inpaint = partial(model.inpaint, steps=command.steps[0])
        else:
            ways, inpaint = {name: model.sample}, model.inpaint
        samples = {
            way: measure_samples(draw, self._decode, self.labels, self.classifier, self.codes, noise(seed, self.device))
            for way, draw in tqdm(ways.items(), desc="sampling", leave=False)
        }
        inpaintings = {}
        for mask in MASKS:
            cells, pixels = self.hidden(mask, seed)
            codes, labels = self._codes_around(pixels), self.real_labels if command.told else None
            drawn = inpaint(codes, cells, labels, batch_size=BATCH, generator=noise(seed, self.device))
            inpaintings[mask] = self._completed(drawn, pixels)
        return Trained(steps, held_out_bits(model, self.held_out, noise(seed, self.device)), samples, inpaintings)

    def limits(self) -> tuple[float, dict[str, Inpainting]]:
        """What no model of these codes can be expected to beat: the Frechet distance of reconstructions of training
        images, and hidden parts filled with their true codes."""
        floor = frechet_distance(
            self.classifier.features_of(self._decode(self.codes[: self.command.n])), self.real_features
        )
        masks = {mask: self.hidden(mask, self.command.seed)[1] for mask in MASKS}
        return floor, {mask: self._completed(self.real_codes, pixels) for mask, pixels in masks.items()}

    def _decode(self, codes: Tensor) -> np.ndarray:
        return decode(self.autoencoder, codes)

    def _codes_around(self, hidden: np.ndarray) -> Tensor:
        return codes_around(self.autoencoder, self.real, hidden).cpu()

    def _completed(self, codes: Tensor, hidden: np.ndarray) -> Inpainting:
        """What was given stays as it was given, to the pixel."""
        images = np.where(hidden[..., None], self._decode(codes), self.real)
        return measure_inpainting(images, self.real, self.real_labels, self.classifier)


def _write(
    out: Path, bench: _Bench, trained: dict[str, list[Trained]], claims: list[Claim], models: dict[str, Any]
) -> None:
    """results.json, with a value for each training, and results.md, with mean and deviation of them."""
    rows = []
    for trainings in trained.values():
        for way in trainings[0].samples:
            drawn = [one.samples[way] for one in trainings]
            rows.append(
                {
                    "model": way,
                    "frechet": [frechet_distance(one.features, bench.real_features) for one in drawn],
                    "class_read": [float(one.right.mean()) for one in drawn],
                    "copied": [one.copied for one in drawn],
                    "ms_per_image": [1e3 * float(one.seconds.mean()) for one in drawn],
                }
            )
    floor, true_codes = bench.limits()
    filled = [
        {
            "mask": mask,
            "model": name,
            "psnr_db": [float(one.psnr.mean()) for one in results],
            "ssim": [float(one.ssim.mean()) for one in results],
            "class_read": [float(one.right.mean()) for one in results],
        }
        for mask in MASKS
        for name, results in (
            *((name, [one.inpaintings[mask] for one in trainings]) for name, trainings in trained.items()),
            ("true codes", [true_codes[mask]]),
        )
    ]
    for name, trainings in trained.items():
        models[name] |= {"steps": [one.steps for one in trainings], "bits_per_code": [one.bits for one in trainings]}
    accuracy = bench.classifier.accuracy(bench.real, bench.real_labels.numpy())
    figures = {
        "models": models,
        "classifier_accuracy": accuracy,
        "frechet_of_reconstructions": floor,
        "samples": rows,
        "inpainting": filled,
        "claims": [asdict(claim) | {"verdict": claim.verdict} for claim in claims],
    }
    write_json(out / "results.json", figures)
    command = bench.command
    sizes = [{"model": name} | model for name, model in models.items()]
    lines = [
        f"{command.seeds} trainings of {60 * command.minutes:g} seconds each; {len(bench.real)} held-out images of "
        f"{command.data}; +- is the standard deviation over trainings. The classifier tells {accuracy:.1%} of the "
        f"held-out images. Reconstructions of training images have a Frechet distance of {floor:.2f}.",
        "",
        *_table(sizes, {"parameters": "{:.0f}", "steps": "{:.0f}", "bits_per_code": "{:.2f}"}),
        "",
        *_table(rows, {"frechet": "{:.2f}", "class_read": "{:.3f}", "copied": "{:.3f}", "ms_per_image": "{:.2f}"}),
        "",
        *_table(filled, {"psnr_db": "{:.2f}", "ssim": "{:.3f}", "class_read": "{:.3f}"}),
        "",
        *table(claims, "resamples"),
        "",
        f"bits_per_code is of held-out images whose class is known; the VQ-DDM's is a bound. {BLIND} The class is "
        f"{'told' if command.told else 'not told'} in inpainting; PSNR and SSIM are of whole images.",
    ]
    (out / "results.md").write_text("\n".join(lines) + "\n")


def _table(rows: list[dict[str, Any]], formats: dict[str, str]) -> list[str]:
    """Markdown; a list of numbers is shown as mean +- standard deviation."""
    words = [name for name in rows[0] if isinstance(rows[0][name], str)]

    def shown(value: Any, form: str) -> str:
        values = np.atleast_1d(value)
        mean = form.format(values.mean())
        return mean if len(values) == 1 else f"{mean} +- {form.format(values.std(ddof=1))}"

    lines = [f"| {' | '.join([*words, *formats])} |", "|" + "---|" * (len(words) + len(formats))]
    for row in rows:
        cells = [row[name] for name in words] + [shown(row[name], form) for name, form in formats.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
