"""`vqfast sample`, `vqfast inpaint`, `vqfast reconstruct`: images out of trained models."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tyro.conf import Positional, arg

from vqfast.cli.reconstruct_dynamic import reconstruct_dynamic, spread
from vqfast.cli.training import AUTOENCODER, DYNAMIC_AUTOENCODER, check_channels, describe, encode, pick_device
from vqfast.data import ImageData, open_dataset, to_float, to_uint8
from vqfast.evaluate import codebook_usage, perplexity, psnr, ssim
from vqfast.evaluate.figures import hide, save_grid
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.registry import kind_of
from vqfast.models.vqddm import VQDDM
from vqfast.train import RunError, check_new, create_run, load_autoencoder, load_model, open_run
from vqfast.train.runs import write_json

COLUMNS = 16
BATCH = 256

# Runs that generate, and the folder in each that holds their autoencoder.
_AUTOENCODERS = {"vqddm": AUTOENCODER, "raster_gpt": AUTOENCODER, "dq_transformer": DYNAMIC_AUTOENCODER}


@dataclass
class Sample:
    """Draw new images from a trained VQ-DDM, DQ-Transformer or raster-order GPT."""

    run: Positional[Path]
    """Run of the model."""
    out: Path
    """Folder to make: samples.png, and samples.npz with images and labels."""
    n: Annotated[int, arg(aliases=["-n"])] = 64
    """How many images, spread evenly over the classes asked for."""
    labels: tuple[str, ...] = ()
    """Classes to draw, by name. Default: every class in turn."""
    steps: int | None = None
    """VQ-DDM: denoising steps; fewer is faster. Default: every noise level of the model."""
    guidance: float = 1.0
    """Strength of classifier-free guidance; above 1 exaggerates the class."""
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
    seed: int = 0
    """Of the noise."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""

    def execute(self) -> None:
        check_new(self.out)
        device = pick_device(self.device)
        model, autoencoder, classes = load_generator(self.run, device)
        labels = _choose_labels(self.labels, classes, self.n)
        special = sampling_settings(self, model)
        drawn = model.sample(
            self.n,
            labels,
            temperature=self.temperature,
            guidance_scale=self.guidance,
            batch_size=BATCH,
            generator=torch.Generator(device).manual_seed(self.seed),
            progress=True,
            **special,
        )
        codes, grains = drawn if isinstance(drawn, tuple) else (drawn, None)
        images = decode(autoencoder, codes)

        settings = {"guidance": self.guidance, "temperature": self.temperature} | special
        out = create_run(self.out, "sample", {"model": str(self.run), "seed": self.seed} | settings).path
        arrays = {"images": images, "codes": codes.cpu().numpy()}
        if grains is not None:
            arrays["grains"] = grains.cpu().numpy()
        if labels is not None:
            arrays["labels"] = np.array(classes)[labels.numpy()]
        np.savez_compressed(out / "samples.npz", **arrays)
        rows, names = _rows_of(images, labels, classes)
        subtitle = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
        save_grid(out / "samples.png", rows, title="Samples", subtitle=subtitle, labels=names)
        print(f"{out}: drew {self.n} images")


@dataclass
class Inpaint:
    """Hide a part of images and let a trained VQ-DDM draw it anew."""

    run: Positional[Path]
    """Run of the VQ-DDM."""
    data: str
    """Images: see vqfast train vqvae."""
    out: Path
    """Folder to make: inpainting.png, and inpainting.npz."""
    mask: Literal["centre", "left", "right", "top", "bottom", "random"] = "centre"
    """Which codes to hide: the middle, half of the grid, or half of its cells at random."""
    n: Annotated[int, arg(aliases=["-n"])] = 8
    """How many images, spread evenly over the split."""
    variations: int = 3
    """Results for each image."""
    split: Literal["train", "held-out", "all"] = "held-out"
    """Which images."""
    unconditional: bool = False
    """Do not tell the model the images' classes."""
    steps: int | None = None
    """Denoising steps. Default: every noise level of the model."""
    guidance: float = 1.0
    """Strength of classifier-free guidance."""
    temperature: float = 1.0
    """Below 1 draws likelier, less varied images."""
    seed: int = 0
    """Of the noise and of the random mask."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""

    def execute(self) -> None:
        check_new(self.out)
        device = pick_device(self.device)
        model, autoencoder, classes = load_generator(self.run, device, "vqddm")
        data = open_dataset(self.data, image_size=autoencoder.config.image_size)
        check_channels(data, autoencoder)
        chosen = spread(data.indices(self.split), self.n)
        images = data.images[chosen]
        labels = None
        if classes and not self.unconditional:
            if data.classes != classes:
                raise RunError(f"{self.data}: has other classes than {self.run} was trained on; add --unconditional")
            labels = torch.from_numpy(data.labels[chosen]).repeat_interleave(self.variations)

        hidden = hidden_cells(self.mask, len(chosen), model.config.grid, self.seed)  # (N, h, w)
        side = autoencoder.config.downsampling
        hidden_pixels = hidden.repeat_interleave(side, 1).repeat_interleave(side, 2).numpy()
        codes = codes_around(autoencoder, images, hidden_pixels, device)
        drawn = model.inpaint(
            codes.repeat_interleave(self.variations, 0),
            hidden.to(device).repeat_interleave(self.variations, 0),
            labels,
            steps=_steps(self.steps, model),
            temperature=self.temperature,
            guidance_scale=self.guidance,
            batch_size=BATCH,
            generator=torch.Generator(device).manual_seed(self.seed),
            progress=True,
        )
        results = decode(autoencoder, drawn).reshape(len(chosen), self.variations, *images.shape[1:])
        # What was given stays as it was given, to the pixel.
        results = np.where(hidden_pixels[:, None, :, :, None], results, images[:, None])

        settings = {"mask": self.mask, "split": self.split, "steps": self.steps, "guidance": self.guidance}
        info = {"model": str(self.run), "data": describe(data), "seed": self.seed} | settings
        out = create_run(self.out, "inpaint", info).path
        np.savez_compressed(
            out / "inpainting.npz", original=images, hidden=hidden_pixels, results=results, indices=chosen
        )
        rows = [images, hide(images, hidden_pixels), *results.swapaxes(0, 1)]
        names = ["original", "given", *(f"result {i + 1}" for i in range(self.variations))]
        save_grid(
            out / "inpainting.png",
            [row[start : start + COLUMNS] for start in range(0, len(chosen), COLUMNS) for row in rows],
            title="Inpainting",
            subtitle=f"{self.split} images, mask: {self.mask}",
            labels=names * -(-len(chosen) // COLUMNS),
            group=len(rows),
        )
        print(f"{out}: drew the hidden part of {len(chosen)} images {self.variations} times")


@dataclass
class Reconstruct:
    """Send images through an autoencoder's codes and back, and measure what is lost."""

    run: Positional[Path]
    """Run of a VQ-VAE, VQGAN or DQ-VAE, or of a VQ-DDM, which holds its own."""
    data: str
    """Images: see vqfast train vqvae."""
    out: Path
    """Folder to make: reconstruction.png and metrics.json."""
    split: Literal["train", "held-out", "all"] = "held-out"
    """Which images."""
    n: Annotated[int, arg(aliases=["-n"])] = 32
    """How many to show; all of the split are measured."""
    target_codes: int | None = None
    """DQ-VAE: codes for each image. Default: as many as its router gives."""
    target_error: float | None = None
    """DQ-VAE: as few codes for each image as bring its mean squared error (values in [-1, 1]) below this."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""

    def execute(self) -> None:
        check_new(self.out)
        if open_run(self.run).kind == "dqvae":
            reconstruct_dynamic(self)
            return
        if self.target_codes is not None or self.target_error is not None:
            raise RunError(
                f"--target-codes, --target-error: need a DQ-VAE, {self.run} has as many codes for every image"
            )
        autoencoder = _load_autoencoder(self.run, pick_device(self.device))
        data = open_dataset(self.data, image_size=autoencoder.config.image_size)
        check_channels(data, autoencoder)
        metrics, results = measure(autoencoder, data, self.split)
        originals, size = data.images[data.indices(self.split)], metrics["codebook_size"]

        info = {"model": str(self.run), "data": describe(data)}
        out = create_run(self.out, "reconstruct", info).path
        write_json(out / "metrics.json", metrics)
        shown = spread(np.arange(len(originals)), self.n)
        rows = []
        for start in range(0, len(shown), COLUMNS):
            part = shown[start : start + COLUMNS]
            rows += [originals[part], results[part]]
        save_grid(
            out / "reconstruction.png",
            rows,
            title="Reconstruction",
            subtitle=f"{len(originals)} {self.split} images: PSNR {metrics['psnr_db']:.1f} dB, "
            f"SSIM {metrics['ssim']:.3f}, {metrics['codebook_usage']:.0%} of {size} codes used",
            labels=["original", "result"] * (len(rows) // 2),
            group=2,
        )
        print(f"{out}: PSNR {metrics['psnr_db']:.2f} dB, codebook usage {metrics['codebook_usage']:.1%}")


def measure(autoencoder: Autoencoder, data: ImageData, split: str) -> tuple[dict[str, Any], np.ndarray]:
    """What is left of the images of a split after the codes: figures, and the images (N, H, W, C) uint8."""
    codes = encode(autoencoder, data, split)
    results = decode(autoencoder, codes)
    size = autoencoder.config.codebook_size
    one, other = to_float(results), to_float(data.images[data.indices(split)])
    metrics = {
        "split": split,
        "images": len(results),
        "psnr_db": psnr(one, other).mean().item(),
        "ssim": ssim(one, other).mean().item(),
        "codebook_size": size,
        "codebook_usage": codebook_usage(codes, size),
        "codebook_usage_10": codebook_usage(codes, size, times=10),
        "perplexity": perplexity(codes, size),
    }
    return metrics, results


def load_generator(
    run: Path, device: torch.device, *kinds: str, checkpoint: Literal["last", "best"] = "last"
) -> tuple[nn.Module, nn.Module, tuple[str, ...]]:
    """A model of codes, its autoencoder, and the names of its classes, empty for an unconditional model.

    Args:
        kinds: which it may be; none for any that generates.
        checkpoint: of the model; see `load_model`.
    """
    found = open_run(run)
    kinds = kinds or tuple(_AUTOENCODERS)
    if found.kind not in kinds:
        raise RunError(f"{run}: holds a {found.kind} run, expected a {' or '.join(kinds)} run")
    model = load_model(run, found.kind, device, checkpoint)
    classes = tuple(found.info.get("data", {}).get("classes", ())) if model.config.num_classes else ()
    folder = run / _AUTOENCODERS[found.kind]
    return model, load_model(folder, open_run(folder).kind, device), classes


def sampling_settings(command: Any, model: nn.Module) -> dict[str, Any]:
    """Settings of a command that this kind of model takes in sampling and others do not, of those that were given.

    Raises:
        RunError: one that the model has no use for.
    """
    given = {
        name: getattr(command, name)
        for name in ("steps", "top_k", "top_p", "position_top_k", "derive_finest")
        if getattr(command, name) not in (None, False)
    }
    taken = inspect.signature(model.sample).parameters
    for name in given:
        if name not in taken:
            raise RunError(f"--{name.replace('_', '-')}: the {kind_of(model)} in {command.run} has no such setting")
    if "steps" in given:
        given["steps"] = _steps(command.steps, model)
    return given


def _load_autoencoder(run: Path, device: torch.device) -> Autoencoder:
    if _AUTOENCODERS.get(open_run(run).kind) == AUTOENCODER:
        run = run / AUTOENCODER
    return load_autoencoder(run, device)


def _steps(steps: int | None, model: VQDDM) -> int | None:
    return None if steps is None else min(steps, model.config.T)


def _choose_labels(names: tuple[str, ...], classes: tuple[str, ...], n: int) -> Tensor | None:
    """(n,) class numbers, the classes asked for in their order, each as often as the others (to one)."""
    if not classes:
        if names:
            raise RunError("--labels: the model was trained without classes")
        return None
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise RunError(f"--labels: no class {', '.join(unknown)}; the model has {', '.join(classes)}")
    wanted = [classes.index(name) for name in names or classes]
    place = np.sort(np.resize(np.arange(len(wanted)), n))
    return torch.tensor(wanted)[torch.from_numpy(place)]


def _rows_of(images: np.ndarray, labels: Tensor | None, classes: tuple[str, ...]) -> tuple[list[np.ndarray], list[str]]:
    """Rows of at most 16 images, one row a class where there are classes, and the rows' names."""
    if labels is None:
        return [images[i : i + COLUMNS] for i in range(0, len(images), COLUMNS)], []
    rows, names = [], []
    for label in dict.fromkeys(labels.tolist()):
        rows.append(images[labels.numpy() == label][:COLUMNS])
        names.append(classes[label])
    return rows, names


@torch.no_grad()
def decode(autoencoder: Autoencoder, codes: Tensor) -> np.ndarray:
    """(N, h, w) codes to (N, H, W, C) uint8."""
    device = next(autoencoder.parameters()).device
    return np.concatenate([to_uint8(autoencoder.decode_codes(part.to(device))) for part in codes.split(BATCH)])


@torch.no_grad()
def codes_around(autoencoder: Autoencoder, images: np.ndarray, hidden: np.ndarray, device: torch.device) -> Tensor:
    """Codes (N, h, w) of images whose hidden pixels are blanked first.

    A code sees beyond its own pixels, and none may carry what the model is to guess.
    """
    blanked = np.where(hidden[..., None], 0, images).astype(np.uint8)
    return torch.cat([autoencoder.encode(part) for part in to_float(blanked).to(device).split(BATCH)])


def hidden_cells(name: str, count: int, grid: tuple[int, int], seed: int) -> Tensor:
    """(count, h, w) bool, true where a code is hidden."""
    h, w = grid
    rows, columns = torch.arange(h)[:, None], torch.arange(w)[None, :]
    if name == "random":
        order = torch.rand(count, h * w, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
        return (order < h * w // 2).view(count, h, w)
    inside = {
        "centre": (rows >= h // 4) & (rows < h - h // 4) & (columns >= w // 4) & (columns < w - w // 4),
        "left": (columns < w // 2).expand(h, w),
        "right": (columns >= w - w // 2).expand(h, w),
        "top": (rows < h // 2).expand(h, w),
        "bottom": (rows >= h - h // 2).expand(h, w),
    }[name]
    return inside.expand(count, h, w)
