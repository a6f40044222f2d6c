"""`vqfast evaluate`: every figure of a trained model, as one JSON file and one table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tyro.conf import Positional

from vqfast.cli.generate import load_generator, sampling_settings
from vqfast.cli.settings import plain
from vqfast.cli.train_vqgan import load_lpips
from vqfast.cli.training import check_channels, describe
from vqfast.data import ImageBatches, ImageData, open_dataset
from vqfast.evaluate.evaluation import Judges, evaluate_likelihood, evaluate_reconstruction, evaluate_samples
from vqfast.evaluate.features import Extractor, InceptionFeatures, TimmFeatures, TorchScriptFeatures
from vqfast.evaluate.report import figure_table
from vqfast.models.dqvae import DQVAE
from vqfast.models.registry import kind_of
from vqfast.train import RunError, check_new, create_run, load_model, open_run
from vqfast.train.runs import write_json

# Figure -> (name in the table, format).
FIGURES = {
    "images": ("images", ",d"),
    "samples": ("samples", ",d"),
    "psnr_db": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "lpips": ("LPIPS", ".4f"),
    "rfid": ("rFID", ".3f"),
    "fid": ("FID", ".3f"),
    "inception_score": ("Inception score", ".3f"),
    "inception_score_std": ("Inception score, deviation over splits", ".3f"),
    "precision": ("precision", ".4f"),
    "recall": ("recall", ".4f"),
    "codes_mean": ("codes an image, mean", ",.1f"),
    "codes_least": ("codes an image, least", ",d"),
    "codes_most": ("codes an image, most", ",d"),
    "codebook_size": ("codebook size", ",d"),
    "codebook_usage": ("codebook usage", ".2%"),
    "codebook_usage_10": ("codebook usage, 10 times or more", ".2%"),
    "perplexity": ("perplexity of the codes", ",.1f"),
    "bits_per_dim": ("bits per code", ".4f"),
    "bits_images": ("images measured for it", ",d"),
    "images_per_s": ("images/s, decoding included", ",.1f"),
}


@dataclass
class Evaluate:
    """Measure a trained model: an autoencoder by its reconstructions, a model of codes by its samples.

    Several processes share the work: torchrun --nproc-per-node 2 -m vqfast.cli evaluate ...
    """

    run: Positional[Path]
    """Run of a VQ-VAE, VQGAN, DQ-VAE, VQ-DDM, DQ-Transformer or raster-order GPT."""
    data: str
    """Images to reconstruct, or to compare samples with: see vqfast train vqvae."""
    out: Path
    """Folder to make: metrics.json and metrics.md."""
    split: Literal["train", "held-out", "all"] = "held-out"
    """Which images."""
    checkpoint: Literal["last", "best"] = "last"
    """Which weights: the newest, or those with the lowest loss on held-out images."""
    inception: Path | None = None
    """FID, Inception score, precision and recall by Inception v3: file of its weights, as torch-fidelity has them
    (weights-inception-2015-12-05-6726825d.pth)."""
    features: Path | None = None
    """The same by another network: a TorchScript file, images (B, 3, H, W) to features (B, D) or (features, logits)."""
    features_size: int | None = None
    """--features: resize images to this many pixels a side."""
    features_values: Literal["0..1", "-1..1", "0..255", "uint8"] = "0..1"
    """--features: values that it takes."""
    timm: str | None = None
    """The same by a classifier of timm, by name; needs --timm-weights."""
    timm_weights: Path | None = None
    """--timm: file of its weights."""
    lpips: tuple[Path, ...] = ()
    """Files that hold the weights of LPIPS: see vqfast train vqgan. Default: no LPIPS."""
    neighbours: int = 3
    """k of precision and recall; 0 leaves them out."""
    splits: int = 10
    """Of the Inception score."""
    n: int | None = None
    """Models of codes: samples. Default: as many as there are images."""
    bits_n: int = 256
    """VQ-DDM and GPT: images whose codes' bits are measured, the first of the split; 0 leaves them out."""
    unconditional: bool = False
    """Do not tell the model classes."""
    steps: int | None = None
    """VQ-DDM: denoising steps, of samples and of the bound. Default: every noise level of the model."""
    guidance: float = 1.0
    """Strength of classifier-free guidance."""
    temperature: float = 1.0
    """Below 1 draws likelier, less varied images."""
    top_k: int | None = None
    """DQ-Transformer and GPT: draw each code from the k likeliest."""
    top_p: float | None = None
    """DQ-Transformer and GPT: draw each code from the fewest whose probabilities sum to at least this."""
    position_top_k: int | None = None
    """DQ-Transformer: draw each position from the k likeliest."""
    derive_finest: bool = False
    """DQ-Transformer: do not draw the finest grain's positions, but take what the coarser ones have left."""
    target_codes: int | None = None
    """DQ-VAE: codes for each image. Default: as many as its router gives."""
    target_error: float | None = None
    """DQ-VAE: as few codes for each image as bring its mean squared error (values in [-1, 1]) below this."""
    batch_size: int = 64
    """Images that each process takes at once."""
    workers: int = 0
    """Processes that read images, for each process of the evaluation."""
    seed: int = 0
    """Of the samples."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""

    def execute(self) -> None:
        for name, least in (("neighbours", 0), ("splits", 1), ("n", 1), ("bits_n", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RunError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
        processes = PartialState(cpu=self.device == "cpu")
        if processes.is_main_process:
            check_new(self.out)
        judges = Judges(
            self._extractor(processes.device),
            _on(load_lpips(self.lpips), processes.device),
            self.neighbours,
            self.splits,
            self.batch_size,
            self.workers,
        )
        kind = open_run(self.run).kind
        measure = self._autoencoder if kind in ("vqvae", "vqgan", "dqvae") else self._generator
        data, figures = measure(processes.device, judges)
        if not processes.is_main_process:
            return
        info = {"model": str(self.run), "data": describe(data), "processes": processes.num_processes}
        out = create_run(self.out, "evaluate", info | self._settings()).path
        write_json(out / "metrics.json", {"kind": kind, "split": self.split} | figures)
        text = figure_table([(name, format(figures[key], f)) for key, (name, f) in FIGURES.items() if key in figures])
        (out / "metrics.md").write_text(text + "\n")
        print(f"{text}\n{out}: measured a {kind}")

    def _autoencoder(self, device: torch.device, judges: Judges) -> tuple[ImageData, dict[str, Any] | None]:
        autoencoder = load_model(self.run, None, device, self.checkpoint)
        targets = {name: getattr(self, name) for name in ("target_codes", "target_error")}
        targets = {name: value for name, value in targets.items() if value is not None}
        if targets and not isinstance(autoencoder, DQVAE):
            raise RunError(f"--target-codes, --target-error: need a DQ-VAE, {self.run} is a {kind_of(autoencoder)}")
        images, data = self._images(autoencoder)
        return data, evaluate_reconstruction(autoencoder, images, judges, progress=True, **targets)

    def _generator(self, device: torch.device, judges: Judges) -> tuple[ImageData, dict[str, Any] | None]:
        if self.target_codes is not None or self.target_error is not None:
            raise RunError(f"--target-codes, --target-error: need a DQ-VAE, not {self.run}")
        model, autoencoder, classes = load_generator(self.run, device, checkpoint=self.checkpoint)
        special = sampling_settings(self, model)
        images, data = self._images(autoencoder)
        conditional = bool(classes) and not self.unconditional
        if conditional and data.classes != classes:
            raise RunError(f"{self.data}: has other classes than {self.run} was trained on; add --unconditional")
        n = self.n or len(images)
        figures = evaluate_samples(
            model,
            autoencoder,
            images,
            judges,
            n=n,
            labels=_labels(data, self.split, n) if conditional else None,
            seed=self.seed,
            progress=True,
            temperature=self.temperature,
            guidance_scale=self.guidance,
            **special,
        )
        if hasattr(model, "bits_per_dim") and self.bits_n:
            bits = evaluate_likelihood(
                model,
                autoencoder,
                ImageBatches(data, self.split, most=self.bits_n),
                judges,
                conditional=conditional,
                steps=special.get("steps"),
                seed=self.seed,
                progress=True,
            )
            figures = None if figures is None else figures | bits
        return data, figures

    def _images(self, autoencoder: nn.Module) -> tuple[ImageBatches, ImageData]:
        data = open_dataset(self.data, image_size=autoencoder.config.image_size)
        check_channels(data, autoencoder)
        return ImageBatches(data, self.split), data

    def _extractor(self, device: torch.device) -> Extractor | None:
        given = [name for name in ("inception", "features", "timm") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RunError(f"--{', --'.join(given)}: expected one of them")
        if (self.timm is None) != (self.timm_weights is None):
            raise RunError("--timm, --timm-weights: expected both or none")
        if self.inception is not None:
            return InceptionFeatures(self.inception, device)
        if self.timm is not None:
            return TimmFeatures(self.timm, self.timm_weights, device)
        if self.features is not None:
            return TorchScriptFeatures(self.features, device, size=self.features_size, values=self.features_values)
        return None

    def _settings(self) -> dict[str, Any]:
        """What the figures depend on, beside model and data, as far as it was given."""
        left_out = ("run", "data", "out", "device", "workers")
        return plain({name: v for name, v in vars(self).items() if name not in left_out and v not in (None, ())})


def _on(module: nn.Module | None, device: torch.device) -> nn.Module | None:
    return None if module is None else module.to(device)


def _labels(data: ImageData, split: str, n: int) -> Tensor:
    """(n,) classes as often as in the images of the split, which they follow in turn."""
    labels = torch.from_numpy(data.labels[data.indices(split)])
    return labels[torch.arange(n) * len(labels) // n] if n < len(labels) else labels[torch.arange(n) % len(labels)]
