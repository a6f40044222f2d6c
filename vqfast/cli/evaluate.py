"""`vqfast evaluate`: every figure of a trained model, as one JSON file and one table."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tyro.conf import Positional, arg

from vqfast.cli.encoding import describe, images_for, labels_of
from vqfast.cli.generators import GENERATORS, DynamicDecoding, load_autoencoder_of, load_generator, same_classes
from vqfast.cli.options import OfImages, OnDevice, VaryingLength, check_out
from vqfast.cli.perceptual import load_lpips
from vqfast.cli.settings import plain
from vqfast.data import ImageBatches, ImageData
from vqfast.evaluate.evaluation import Judges, evaluate_likelihood, evaluate_reconstruction, evaluate_samples
from vqfast.evaluate.features import Extractor, InceptionFeatures, TimmFeatures, TorchScriptFeatures
from vqfast.evaluate.report import figure_table
from vqfast.models.registry import kind_of
from vqfast.train import RunError, create_run, open_run
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
    "target_missed": ("images above the target error with the most codes", ",d"),
    "codebook_size": ("codebook size", ",d"),
    "codebook_usage": ("codebook usage", ".2%"),
    "codebook_usage_10": ("codebook usage, 10 times or more", ".2%"),
    "perplexity": ("perplexity of the codes", ",.1f"),
    "bits_per_dim": ("bits per code", ".4f"),
    "bits_images": ("images measured for it", ",d"),
    "images_per_s": ("images/s, decoding included", ",.1f"),
}


@dataclass(kw_only=True)
class Evaluate(VaryingLength, DynamicDecoding, OnDevice, OfImages):
    """Measure a trained model: an autoencoder by its reconstructions, a model of codes by its samples.

    Several processes share the work: torchrun --nproc-per-node 2 -m vqfast.cli evaluate ...
    """

    run: Positional[Path]
    """Run of a VQ-VAE, VQGAN, DQ-VAE, VQ-DDM, DQ-Transformer or raster-order GPT."""
    data: str
    """Images to reconstruct, or to compare samples with: see vqfast train vqvae."""
    out: Path
    """Folder to make: metrics.json and metrics.md."""
    steps: int | None = None
    """VQ-DDM: denoising steps, of samples and of the bound. Default: every noise level of the model."""
    seed: int = 0
    """Of the samples."""
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
    n: Annotated[int | None, arg(aliases=["-n"])] = None
    """Models of codes: samples. Default: as many as there are images."""
    bits_n: int = 256
    """VQ-DDM and GPT: images whose codes' bits are measured, the first of the split; 0 leaves them out."""
    unconditional: bool = False
    """Do not tell the model classes."""
    batch_size: int = 64
    """Images that each process takes at once."""
    workers: int = 0
    """Processes that read images, for each process of the evaluation."""

    def execute(self) -> None:
        for name, least in (("neighbours", 0), ("splits", 1), ("n", 1), ("bits_n", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RunError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
        processes = PartialState(cpu=self.device == "cpu")
        if processes.is_main_process:
            check_out(self.out)
        kind = open_run(self.run).kind
        judges = Judges(
            self._extractor(processes.device),
            _on(load_lpips(self.lpips), processes.device),
            self.neighbours,
            self.splits,
            self.batch_size,
            self.workers,
        )
        measure = self._generator if kind in GENERATORS else self._autoencoder
        data, figures = measure(processes.device, judges)
        if not processes.is_main_process:
            return
        info = {"model": str(self.run), "data": describe(data), "processes": processes.num_processes}
        out = create_run(self.out, "evaluate", info | self._settings()).path
        write_json(out / "metrics.json", {"kind": kind, "split": self.split} | figures)
        text = figure_table([(name, format(figures[key], f)) for key, (name, f) in FIGURES.items() if key in figures])
        (out / "metrics.md").write_text(text + "\n")
        self.say_missed(figures)
        print(f"{text}\n{out}: measured a {kind}")

    def _autoencoder(self, device: torch.device, judges: Judges) -> tuple[ImageData, dict[str, Any] | None]:
        sampling = [f for f in fields(DynamicDecoding) if f.name != "seed"]
        given = [f.name for f in sampling if getattr(self, f.name) != f.default] + ["n"] * (self.n is not None)
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise RunError(f"{flags}: {self.run} is of an autoencoder, which draws no samples")
        autoencoder = load_autoencoder_of(self.run, device, self.checkpoint)
        targets = self.targets(self.run, kind_of(autoencoder))
        images, data = self._images(autoencoder)
        return data, evaluate_reconstruction(autoencoder, images, judges, progress=True, **targets)

    def _generator(self, device: torch.device, judges: Judges) -> tuple[ImageData, dict[str, Any] | None]:
        model, autoencoder, classes = load_generator(self.run, device, checkpoint=self.checkpoint)
        self.targets(self.run, kind_of(model))  # it has no use for any
        arguments = self.arguments(model.sample, model, self.run)
        images, data = self._images(autoencoder)
        conditional = same_classes(data, self.run, classes, self.unconditional)
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
            **arguments,
        )
        if hasattr(model, "bits_per_dim") and self.bits_n:
            bits = evaluate_likelihood(
                model,
                autoencoder,
                ImageBatches(data, self.split, most=self.bits_n),
                judges,
                conditional=conditional,
                steps=arguments.get("steps"),
                seed=self.seed,
                progress=True,
            )
            figures = None if figures is None else figures | bits
        return data, figures

    def _images(self, autoencoder: nn.Module) -> tuple[ImageBatches, ImageData]:
        data = images_for(self.data, autoencoder)
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
    labels = labels_of(data, split)
    return labels[torch.arange(n) * len(labels) // n] if n < len(labels) else labels[torch.arange(n) % len(labels)]
