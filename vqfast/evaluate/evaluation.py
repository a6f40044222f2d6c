"""What a trained model is worth: batch by batch, by one process or several, every figure from sums over images."""

import inspect
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vqfast.data import ImageBatches, read_ahead, to_float, to_uint8
from vqfast.evaluate.averages import Averages
from vqfast.evaluate.codes import CodeCounts
from vqfast.evaluate.features import Extractor
from vqfast.evaluate.frechet import frechet_of_moments
from vqfast.evaluate.images import psnr, ssim
from vqfast.evaluate.inception_score import InceptionScore
from vqfast.evaluate.moments import Moments
from vqfast.evaluate.neighbours import precision_recall
from vqfast.evaluate.processes import from_all, own_batches, rank_and_count, total
from vqfast.models.dqvae import DynamicCodes
from vqfast.nn.perceptual import LPIPS
from vqfast.ops import pack


@dataclass(frozen=True)
class Judges:
    """Who looks at images, and how they are shown.

    extractor: of features; None leaves out what needs some. lpips: None leaves it out.
    neighbours: k of precision and recall; 0 leaves them out. splits: of the inception score.
    batch_size: images at once. workers: processes that read images, for each process of the evaluation.
    """

    extractor: Extractor | None = None
    lpips: LPIPS | None = None
    neighbours: int = 3
    splits: int = 10
    batch_size: int = 64
    workers: int = 0


@dataclass(frozen=True)
class Seen:
    """What the extractor saw in a set of images; two of them add up to that of both sets.

    features: (N, D) float32 on the CPU. score: None where the network has no logits.
    """

    moments: Moments
    features: Tensor
    score: InceptionScore | None

    def __add__(self, other: "Seen") -> "Seen":
        score = None if self.score is None else self.score + other.score
        return Seen(self.moments + other.moments, torch.cat([self.features, other.features]), score)


def count_codes(codes: Tensor | DynamicCodes, codebook_size: int) -> CodeCounts:
    """Of images as codes (N, h, w) or as codes of variable length, each of them counted once."""
    if isinstance(codes, DynamicCodes):
        packed = pack(codes.codes, codes.grains)
        return CodeCounts.of(packed.values[packed.grain_ids >= 0], codes.lengths, codebook_size)
    return CodeCounts.of(codes, torch.full((len(codes),), codes[0].numel()), codebook_size)


@torch.no_grad()
def evaluate_reconstruction(
    autoencoder: nn.Module, images: ImageBatches, judges: Judges, *, progress: bool = False, **targets
) -> dict[str, Any] | None:
    """How much of images is left after an autoencoder's codes; results are rounded to uint8 as files hold them.

    Args:
        autoencoder: VQVAE, VQGAN or DQVAE in eval mode.
        images: to measure on; all of them are.
        progress: show a bar.
        targets: of a DQVAE's `encode`. Of a target_error the figures tell how many images stay above it with the most
            codes that they can have (target_missed), and the least and the largest of their errors.

    Returns:
        Figures by name, in the first process; None in others.
    """
    _check_neighbours(judges, len(images), len(images))
    averages, counts, originals, results, missed, seconds = [], [], [], [], [], 0.0
    target = targets.get("target_error")
    for _, positions, batch in _batches(images, judges, _device(autoencoder), "reconstructing", progress):
        image = batch["image"]
        started = time.perf_counter()
        codes = autoencoder.encode(image, **targets)
        decoded = autoencoder.decode_codes(codes)
        pixels = to_uint8(decoded)
        seconds += time.perf_counter() - started
        if target is not None:
            missed.append(_errors_above(target, codes, decoded, image, autoencoder.config.fine_grid_size**2))
        output = to_float(pixels).to(image)
        likeness = {"psnr_db": psnr(output, image), "ssim": ssim(output, image)}
        if judges.lpips is not None:
            likeness["lpips"] = judges.lpips(output, image)
        averages.append(Averages.of(likeness))
        counts.append(count_codes(codes, autoencoder.config.codebook_size))
        if judges.extractor is not None:
            originals.append(_look(judges, image, positions, len(images)))
            results.append(_look(judges, output, positions, len(images)))
    likeness, counts, speed = total(averages), total(counts), _images_per_s(len(images), seconds)
    missed = total(missed) or []
    seen = (total(originals), total(results)) if judges.extractor is not None else None
    if rank_and_count()[0] != 0:
        return None
    figures = {"images": len(images), **likeness.means()}
    if seen is not None:
        figures |= _compared("rfid", *seen, judges)
    if target is not None:
        figures["target_missed"] = len(missed)
    if missed:
        figures |= {"target_missed_least_mse": min(missed), "target_missed_most_mse": max(missed)}
    return figures | counts.figures() | {"images_per_s": speed}


@torch.no_grad()
def evaluate_samples(
    model: nn.Module,
    autoencoder: nn.Module,
    images: ImageBatches,
    judges: Judges,
    *,
    n: int,
    labels: Tensor | None = None,
    seed: int = 0,
    progress: bool = False,
    **options,
) -> dict[str, Any] | None:
    """How like real images a model's samples are, as a set.

    A batch's random numbers depend on the seed and its number, so the samples on the batch size but not on how many
    processes draw them.

    Args:
        model: VQDDM, DQTransformer or RasterGPT in eval mode.
        autoencoder: whose codes it draws.
        images: real ones, to compare with.
        n: samples.
        labels: (n,) int64, their classes; None for none.
        seed: of the samples.
        progress: show a bar.
        options: of the model's `sample`.

    Returns:
        Figures by name, in the first process; None in others.
    """
    _check_neighbours(judges, len(images), n)
    device, counts, results, seconds = _device(autoencoder), [], [], 0.0
    for number, positions in _bar(list(own_batches(n, judges.batch_size)), "sampling", progress):
        started = time.perf_counter()
        drawn = model.sample(
            len(positions),
            None if labels is None else labels[torch.from_numpy(positions)],
            generator=_generator(seed, number, device),
            **options,
        )
        codes = DynamicCodes(*drawn) if isinstance(drawn, tuple) else drawn
        pixels = to_uint8(autoencoder.decode_codes(codes))
        seconds += time.perf_counter() - started
        counts.append(count_codes(codes, autoencoder.config.codebook_size))
        if judges.extractor is not None:
            results.append(_look(judges, to_float(pixels).to(device), positions, n))
    originals = []
    if judges.extractor is not None:
        for _, positions, batch in _batches(images, judges, device, "looking at images", progress):
            originals.append(_look(judges, batch["image"], positions, len(images)))
    counts, speed = total(counts), _images_per_s(n, seconds)
    seen = (total(originals), total(results)) if judges.extractor is not None else None
    if rank_and_count()[0] != 0:
        return None
    figures = {"samples": n} | ({} if seen is None else {"images": len(images)} | _compared("fid", *seen, judges))
    return figures | counts.figures() | {"images_per_s": speed}


@torch.no_grad()
def evaluate_likelihood(
    model: nn.Module,
    autoencoder: nn.Module,
    images: ImageBatches,
    judges: Judges,
    *,
    conditional: bool,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any] | None:
    """How many bits the codes of images cost under a model of codes that has `bits_per_dim`.

    Args:
        model, autoencoder, seed, progress: as for `evaluate_samples`.
        images: to measure on; all of them are.
        conditional: tell the model the images' classes.
        steps: of a VQDDM: see its `bits_per_dim`.

    Returns:
        Figures by name, in the first process; None in others.
    """
    device, taken, averages = _device(autoencoder), inspect.signature(model.bits_per_dim).parameters, []
    for number, _, batch in _batches(images, judges, device, "measuring bits", progress):
        codes = autoencoder.encode(batch["image"])
        options = {"steps": steps, "generator": _generator(seed, number, device)}
        options = {name: value for name, value in options.items() if name in taken}
        labels = batch["label"] if conditional else None
        averages.append(Averages.of({"bits_per_dim": model.bits_per_dim(codes, labels, **options)}))
    bits = total(averages)
    return None if bits is None else bits.means() | {"bits_images": bits.count}


def _errors_above(target: float, codes: DynamicCodes, decoded: Tensor, images: Tensor, most: int) -> list[float]:
    """Mean squared errors of those images that have the most codes and are not brought below the target by them."""
    errors = (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    return errors[(errors >= target) & (codes.lengths == most)].tolist()


def _check_neighbours(judges: Judges, real: int, made: int) -> None:
    """Before any work is done for nothing."""
    if judges.extractor is not None and min(real, made) <= max(judges.neighbours, 1):
        raise ValueError(
            f"neighbours: expected fewer than the images, of which there are to be two at least, {real} real and "
            f"{made} made, got {judges.neighbours}"
        )


def _look(judges: Judges, images: Tensor, positions: np.ndarray, count: int) -> Seen:
    """What the extractor sees in images that are at these positions among `count`."""
    features, logits = judges.extractor(images)
    splits = torch.from_numpy(positions * judges.splits // count)
    score = None if logits is None else InceptionScore.of(logits, splits, judges.splits)
    return Seen(Moments.of(features), features.cpu(), score)


def _compared(name: str, real: Seen, made: Seen, judges: Judges) -> dict[str, float]:
    figures = {name: frechet_of_moments(real.moments, made.moments)}
    if made.score is not None:
        scores = made.score.scores()
        figures |= {"inception_score": scores.mean().item(), "inception_score_std": scores.std(correction=0).item()}
    if judges.neighbours:
        precision, recall = precision_recall(real.features, made.features, judges.neighbours)
        figures |= {"precision": precision, "recall": recall}
    return figures


def _batches(
    images: ImageBatches, judges: Judges, device: torch.device, what: str, progress: bool
) -> Iterator[tuple[int, np.ndarray, dict[str, Tensor]]]:
    """This process's batches of images: number, positions, tensors on the device."""
    own = list(own_batches(len(images), judges.batch_size))
    read = read_ahead(images, [positions for _, positions in own], judges.workers, device)
    for (number, positions), batch in zip(_bar(own, what, progress), read, strict=True):
        yield number, positions, batch


def _bar(batches: list, what: str, progress: bool) -> tqdm:
    shown = progress and rank_and_count()[0] == 0
    # None: shown where somebody looks.
    return tqdm(batches, what, unit="batch", leave=False, disable=None if shown else True)


def _images_per_s(count: int, seconds: float) -> float:
    """Of all processes together, in the first one: the slowest says when they are done."""
    return count / max(from_all(seconds), default=math.inf)


def _generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    state = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
