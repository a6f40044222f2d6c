"""What the trainings that `vqfast compare vqddm` compares share, and how each of them is measured."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vqfast.cli.encoding import decode, encode, labels_at, labels_of
from vqfast.cli.generators import noise
from vqfast.cli.masks import codes_around, hidden_cells, hidden_pixels
from vqfast.cli.sheets import spread
from vqfast.data import CodeBatches, ImageData
from vqfast.evaluate.frechet import frechet_distance
from vqfast.evaluate.global_context import (
    BATCH,
    Inpainting,
    Trained,
    held_out_bits,
    measure_inpainting,
    measure_samples,
)
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.raster_gpt import RasterGPT
from vqfast.models.vqddm import VQDDM

if TYPE_CHECKING:
    from vqfast.cli.compare_vqddm import CompareVQDDM

MASKS = ("centre", "random")


class Bench:
    """What all trainings share: codes, held-out images, the classifier that judges.

    real: (N, H, W, C) uint8 held-out images, whose labels and classifier's features are beside them.
    """

    def __init__(self, command: "CompareVQDDM", data: ImageData, autoencoder: Autoencoder, device: torch.device):
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
