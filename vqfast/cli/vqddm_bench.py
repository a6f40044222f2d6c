"""How a training of `vqfast compare vqddm` is measured: samples, likelihood, inpainting."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from vqfast.cli.bench import Bench
from vqfast.cli.encoding import encode
from vqfast.cli.generators import noise
from vqfast.cli.masks import codes_around, hidden_cells, hidden_pixels
from vqfast.data import CodeBatches, ImageData
from vqfast.evaluate.generation import BATCH
from vqfast.evaluate.global_context import Inpainting, TrainedInpainter, held_out_bits, measure_inpainting
from vqfast.models.autoencoder import Autoencoder
from vqfast.models.raster_gpt import RasterGPT
from vqfast.models.vqddm import VQDDM

if TYPE_CHECKING:
    from vqfast.cli.compare_vqddm import CompareVQDDM

MASKS = ("centre", "random")


class VQDDMBench(Bench):
    """A bench on which holes are filled too."""

    def __init__(self, command: "CompareVQDDM", data: ImageData, autoencoder: Autoencoder):
        super().__init__(command, data, autoencoder, encode(autoencoder, data, "train"))
        self.grid = (autoencoder.config.grid_size,) * 2
        self.real_codes = self._codes_around(np.zeros(self.real.shape[:3], dtype=bool))
        self.held_out = CodeBatches(self.real_codes, self.real_labels)

    def ways(self, name: str, model: VQDDM | RasterGPT) -> dict[str, Callable]:
        if isinstance(model, VQDDM):
            return {f"{name}, {steps} steps": partial(model.sample, steps=steps) for steps in self.command.steps}
        return {name: model.sample}

    def measure(self, name: str, model: VQDDM | RasterGPT, steps: int, seed: int) -> TrainedInpainter:
        samples = super().measure(name, model, steps, seed).samples
        inpaint = partial(model.inpaint, steps=self.command.steps[0]) if isinstance(model, VQDDM) else model.inpaint
        inpaintings = {}
        for mask in MASKS:
            cells, pixels = self.hidden(mask, seed)
            codes, labels = self._codes_around(pixels), self.real_labels if self.command.told else None
            drawn = inpaint(codes, cells, labels, batch_size=BATCH, generator=noise(seed, self.device))
            inpaintings[mask] = self._completed(drawn, pixels)
        bits = held_out_bits(model, self.held_out, noise(seed, self.device))
        return TrainedInpainter(steps, samples, bits, inpaintings)

    def hidden(self, mask: str, seed: int) -> tuple[Tensor, np.ndarray]:
        """True where codes (N, h, w) and pixels (N, H, W) of the held-out images are hidden."""
        cells = hidden_cells(mask, len(self.real), self.grid, seed)
        return cells, hidden_pixels(cells, self.autoencoder.config.downsampling)

    def true_codes(self) -> dict[str, Inpainting]:
        """Hidden parts filled with their true codes: no model of these codes can be expected to do better."""
        masks = {mask: self.hidden(mask, self.command.seed)[1] for mask in MASKS}
        return {mask: self._completed(self.real_codes, pixels) for mask, pixels in masks.items()}

    def _codes_around(self, hidden: np.ndarray) -> Tensor:
        return codes_around(self.autoencoder, self.real, hidden).cpu()

    def _completed(self, codes: Tensor, hidden: np.ndarray) -> Inpainting:
        """What was given stays as it was given, to the pixel."""
        images = np.where(hidden[..., None], self.decode(codes), self.real)
        return measure_inpainting(images, self.real, self.real_labels, self.classifier)
