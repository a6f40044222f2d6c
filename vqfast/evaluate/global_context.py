"""Does it help to see all codes at once? Diffusion against raster order, at equal parameters and equal training time.

What VQ-DDM claims (Hu et al. 2022, arXiv 2112.01799), on the codes of one auto-encoder. Its denoiser reads the whole
grid at every step; a raster-order transformer draws a code knowing those before it alone, so that where a part of an
image is missing it is blind to what is known below and to the right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from vqfast.data import CodeBatches, to_float
from vqfast.evaluate.claims import Claim, bootstrap
from vqfast.evaluate.codes import copied
from vqfast.evaluate.frechet import Classifier, frechet_distance
from vqfast.evaluate.generation import clock
from vqfast.evaluate.images import psnr, ssim
from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig
from vqfast.models.vqddm import VQDDM, VQDDMConfig

TOLERANCE = 0.02  # numbers of parameters that count as equal differ by this share at most
BATCH = 64  # of images that are drawn together
_FINEST_PSNR = 48.13  # dB of an error of one level of 8 bits: equal images count as this, not as infinity


def parameter_count(model_class: type[nn.Module], config: VQDDMConfig | RasterGPTConfig) -> int:
    """Number of parameters of a model of this make; takes no memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(config).parameters())


def raster_equal(config: VQDDMConfig) -> RasterGPTConfig:
    """The raster-order transformer for the codes of a VQ-DDM that has as many parameters, to 2 %.

    Its depth is the nearest to the VQ-DDM's at which some width fits.

    Raises:
        ValueError: no width and depth fit.
    """
    wanted = parameter_count(VQDDM, config)
    for depth in sorted(range(1, 2 * config.depth + 1), key=lambda depth: abs(depth - config.depth)):

        def make(units: int, depth: int = depth) -> RasterGPTConfig:
            return RasterGPTConfig(
                codebook_size=config.codebook_size,
                grid=config.grid,
                dim=units * config.heads,
                depth=depth,
                heads=config.heads,
                num_classes=config.num_classes,
                class_dropout=config.class_dropout,
            )

        count = lambda units, make=make: parameter_count(RasterGPT, make(units))
        low, high = 1, 2
        while count(high) < wanted:
            low, high = high, 2 * high
        while high - low > 1:  # count(low) < wanted <= count(high)
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) < wanted else (low, middle)
        best = min(low, high, key=lambda units: abs(count(units) - wanted))
        if abs(count(best) - wanted) <= TOLERANCE * wanted:
            return make(best)
    raise ValueError(
        f"heads: no raster-order transformer of {config.heads} heads and up to {2 * config.depth} blocks has "
        f"{wanted} parameters to {TOLERANCE:.0%}"
    )


@dataclass(frozen=True)
class Samples:
    """What one training of a model draws.

    images: (n, H, W, C) uint8. features: (n, D) float, of the classifier that judges. right: (n,) float, 1 where it
    reads the class asked for. seconds: (batches,) float, of drawing the codes of an image. copied: share of the samples
    whose codes are those of a training image.
    """

    images: np.ndarray
    features: Tensor
    right: Tensor
    seconds: Tensor
    copied: float


@dataclass(frozen=True)
class Inpainting:
    """What one training of a model makes of images with hidden parts.

    images: (N, H, W, C) uint8. psnr: (N,) dB, ssim: (N,), of whole images, in which what was given is exact.
    right: (N,) float, 1 where the classifier reads the true class.
    """

    images: np.ndarray
    psnr: Tensor
    ssim: Tensor
    right: Tensor


@dataclass(frozen=True)
class Trained:
    """One training of one model.

    steps: taken in its time. bits: per code of held-out images; the VQ-DDM's are a bound. samples: by the name of the
    way of drawing. inpaintings: by the name of the mask.
    """

    steps: int
    bits: float
    samples: dict[str, Samples]
    inpaintings: dict[str, Inpainting]


def measure_samples(
    draw: Callable[..., Tensor],
    decode: Callable[[Tensor], np.ndarray],
    labels: Tensor,
    classifier: Classifier,
    training_codes: Tensor,
    generator: torch.Generator,
) -> Samples:
    """Draw an image for each label.

    Args:
        draw: (n, labels, generator=) to (n, h, w) codes: a model's `sample`.
        decode: codes to (n, H, W, C) uint8.
        labels: (n,) int64.
        training_codes: (M, h, w).
        generator: of the noise; its device is the model's.
    """
    codes, seconds = [], []
    for part in labels.split(BATCH):
        start = clock(generator.device)
        codes.append(draw(len(part), part, generator=generator))
        seconds.append((clock(generator.device) - start) / len(part))
    drawn = torch.cat(codes).cpu()
    images = decode(drawn)
    features = classifier.features_of(images)
    return Samples(
        images, features, _right(classifier, features, labels), torch.tensor(seconds), copied(drawn, training_codes)
    )


def measure_inpainting(images: np.ndarray, originals: np.ndarray, labels: Tensor, classifier: Classifier) -> Inpainting:
    """Compare completed images (N, H, W, C) uint8 with what they were, and read their class (N,)."""
    one, other = to_float(images), to_float(originals)
    right = _right(classifier, classifier.features_of(images), labels)
    return Inpainting(images, psnr(one, other).clamp(max=_FINEST_PSNR), ssim(one, other), right)


@torch.no_grad()
def _right(classifier: Classifier, features: Tensor, labels: Tensor) -> Tensor:
    return (classifier.head(features).argmax(1) == labels).double()


@torch.no_grad()
def held_out_bits(model: VQDDM | RasterGPT, codes: CodeBatches, generator: torch.Generator) -> float:
    """Bits per code of held-out images, given their class: exact of a RasterGPT, the bound of a VQ-DDM."""
    total = 0.0
    for positions in np.array_split(np.arange(len(codes)), -(-len(codes) // BATCH)):
        batch = {name: values.to(generator.device) for name, values in codes[positions].items()}
        if isinstance(model, VQDDM):
            bits = model.bits_per_dim(batch["codes"], batch["label"], generator=generator).mean()
        else:
            bits = model.training_step(batch)["bits_per_dim"]
        total += float(bits) * len(positions)
    return total / len(codes)


def judge(
    diffusion: Sequence[Trained],
    raster: Sequence[Trained],
    way: str,
    raster_way: str,
    real: Tensor,
    *,
    resamples: int = 300,
    seed: int = 0,
) -> list[Claim]:
    """The paper's claims, by all trainings of both models.

    Args:
        diffusion, raster: trainings of the VQ-DDM and of the raster-order transformer, as many of each.
        way, raster_way: whose samples to take, names in Trained.samples.
        real: (M, D) features of held-out images.
        resamples, seed: of the bootstrap.
    """

    def stacked(figure: Callable[[Trained], Tensor], trainings: Sequence[Trained]) -> Tensor:
        return torch.stack([figure(training).double() for training in trainings])

    def more(text: str, figure: Callable[[Trained], Tensor], other: Callable[[Trained], Tensor]) -> Claim:
        """By figures (images,) of each training of which larger is better."""
        d = stacked(figure, diffusion) - stacked(other, raster)
        return bootstrap(text, lambda s, i: d[s][:, i].mean(), *d.shape, resamples, seed)

    ours = stacked(lambda trained: trained.samples[way].features, diffusion)
    theirs = stacked(lambda trained: trained.samples[raster_way].features, raster)

    def nearer(s: Tensor, i: Tensor) -> Tensor:
        distance = lambda features: np.mean([frechet_distance(features[k][i], real) for k in s.tolist()])
        return torch.tensor(distance(theirs) - distance(ours))

    def of(way: str, figure: str, sign: int = 1) -> Callable[[Trained], Tensor]:
        return lambda trained: sign * getattr(trained.samples[way], figure)

    claims = [
        bootstrap("samples: nearer to real images (Frechet distance)", nearer, *ours.shape[:2], resamples, seed),
        more("samples: show the class asked for more often", of(way, "right"), of(raster_way, "right")),
        more("samples: take less time an image (seconds)", of(way, "seconds", -1), of(raster_way, "seconds", -1)),
    ]
    for mask in diffusion[0].inpaintings:
        for text, name in (
            ("higher PSNR (dB)", "psnr"),
            ("higher SSIM", "ssim"),
            ("true class read more often", "right"),
        ):
            figure = partial(lambda trained, mask, name: getattr(trained.inpaintings[mask], name), mask=mask, name=name)
            claims.append(more(f"inpainting, {mask}: {text}", figure, figure))
    return claims
