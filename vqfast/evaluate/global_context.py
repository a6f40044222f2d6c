"""Does it help to see all codes at once? Diffusion against raster order, at equal parameters and equal training time.

What VQ-DDM claims (Hu et al. 2022, arXiv 2112.01799), on the codes of one auto-encoder. Its denoiser reads the whole
grid at every step; a raster-order transformer draws a code knowing those before it alone, so that where a part of an
image is missing it is blind to what is known below and to the right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqfast.data import CodeBatches, to_float
from vqfast.evaluate.claims import Claim, bootstrap_of_mean
from vqfast.evaluate.frechet import Classifier
from vqfast.evaluate.generation import BATCH, Trained, class_read, judge_samples
from vqfast.evaluate.images import psnr, ssim
from vqfast.models.raster_gpt import RasterGPT
from vqfast.models.vqddm import VQDDM

_FINEST_PSNR = 48.13  # dB of an error of one level of 8 bits: equal images count as this, not as infinity


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
class TrainedInpainter(Trained):
    """One training of a model that also fills holes.

    bits: per code of held-out images; the VQ-DDM's are a bound. inpaintings: by the name of the mask.
    """

    bits: float
    inpaintings: dict[str, Inpainting]


def measure_inpainting(images: np.ndarray, originals: np.ndarray, labels: Tensor, classifier: Classifier) -> Inpainting:
    """Compare completed images (N, H, W, C) uint8 with what they were, and read their class (N,)."""
    one, other = to_float(images), to_float(originals)
    right = class_read(classifier, classifier.features_of(images), labels)
    return Inpainting(images, psnr(one, other).clamp(max=_FINEST_PSNR), ssim(one, other), right)


@torch.no_grad()
def held_out_bits(model: VQDDM | RasterGPT, codes: CodeBatches, generator: torch.Generator) -> float:
    """Bits per code of held-out images, given their class: exact of a RasterGPT, the bound of a VQ-DDM."""
    total = 0.0
    for positions in np.array_split(np.arange(len(codes)), -(-len(codes) // BATCH)):
        batch = {name: values.to(generator.device) for name, values in codes[positions].items()}
        noise = {"generator": generator} if isinstance(model, VQDDM) else {}
        total += float(model.bits_per_dim(batch["codes"], batch["label"], **noise).sum())
    return total / len(codes)


def judge(
    diffusion: Sequence[TrainedInpainter],
    raster: Sequence[TrainedInpainter],
    real: Tensor,
    *,
    resamples: int = 300,
    seed: int = 0,
) -> list[Claim]:
    """The paper's claims, by all trainings of both models.

    Args:
        diffusion, raster: trainings of the VQ-DDM and of the raster-order transformer, as many of each.
        real: (M, D) features of held-out images.
        resamples, seed: of the bootstrap.
    """
    claims = judge_samples(diffusion, raster, real, resamples=resamples, seed=seed)
    for mask in diffusion[0].inpaintings:
        for text, figure in (
            ("higher PSNR (dB)", "psnr"),
            ("higher SSIM", "ssim"),
            ("true class read more often", "right"),
        ):
            ours, theirs = (
                torch.stack([getattr(one.inpaintings[mask], figure).double() for one in trainings])
                for trainings in (diffusion, raster)
            )
            claims.append(bootstrap_of_mean(f"inpainting, {mask}: {text}", ours - theirs, resamples, seed))
    return claims
