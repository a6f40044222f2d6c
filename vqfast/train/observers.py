"""Who looks at a training: the bar in the terminal, metrics.jsonl, TensorBoard, pictures in the run's folder."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vqfast.data import to_uint8
from vqfast.evaluate.figures import save_grid
from vqfast.train.metrics import METRICS_FILE

PICTURES = "pictures"
_MOST_PICTURES = 8


class Observer:
    """Told what happens; every method does nothing unless overridden."""

    def stepped(self) -> None:
        """A training step was taken."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Means since the last time, or held-out figures (held_out/...)."""

    def pictures(self, step: int, images: dict[str, Tensor]) -> None:
        """name: (N, C, H, W) float in [-1, 1]."""

    def histograms(self, step: int, values: dict[str, Tensor]) -> None:
        """name: numbers of any shape."""

    def close(self) -> None:
        """The training is over."""


class ProgressBar(Observer):
    """Loss, images a second, codebook usage, GPU memory."""

    def __init__(self, kind: str, start: int, steps: int):
        self._bar = tqdm(total=steps, initial=start, desc=f"training {kind}", unit="step")

    def stepped(self) -> None:
        self._bar.update()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if "images_per_s" not in values:
            return
        parts = [f"loss {values['loss']:.4g}", f"{values['images_per_s']:.0f} images/s"]
        if "usage" in values:
            parts.append(f"codes used {values['usage']:.0%}")
        if "gpu_memory_gb" in values:
            parts.append(f"GPU {values['gpu_memory_gb']:.1f} GB")
        self._bar.set_postfix_str(", ".join(parts))

    def close(self) -> None:
        self._bar.close()


class MetricsFile(Observer):
    """Appends each set of scalars to metrics.jsonl."""

    def __init__(self, run: Path):
        self._path = run / METRICS_FILE

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")


class PictureFiles(Observer):
    """RUN/pictures/00000500.png: one row a name."""

    def __init__(self, run: Path):
        self._folder = run / PICTURES

    def pictures(self, step: int, images: dict[str, Tensor]) -> None:
        self._folder.mkdir(exist_ok=True)
        rows = [to_uint8(image[:_MOST_PICTURES]) for image in images.values()]
        save_grid(self._folder / f"{step:08d}.png", rows, title=f"Step {step}", labels=list(images))


class TensorBoard(Observer):
    """Scalars, pictures and histograms in RUN/tensorboard; after a resume, steps taken anew replace the old."""

    def __init__(self, run: Path, start: int):
        # Slow to import, and not wanted by every training.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def pictures(self, step: int, images: dict[str, Tensor]) -> None:
        for name, image in images.items():
            row = np.concatenate(list(to_uint8(image[:_MOST_PICTURES])), axis=1)
            self._writer.add_image(name, row, step, dataformats="HWC")

    def histograms(self, step: int, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._writer.add_histogram(name, value.detach().float().cpu(), step)

    def close(self) -> None:
        self._writer.close()


class Observers(Observer):
    """Tells each of them. One that cannot write is left out from then on, and says so: a full disk ends no training."""

    def __init__(self, observers: Sequence[Observer]):
        self._observers = list(observers)

    def stepped(self) -> None:
        self._tell("stepped")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._tell("scalars", step, values)

    def pictures(self, step: int, images: dict[str, Tensor]) -> None:
        self._tell("pictures", step, images)

    def histograms(self, step: int, values: dict[str, Tensor]) -> None:
        self._tell("histograms", step, values)

    def close(self) -> None:
        self._tell("close")

    def _tell(self, event: str, *arguments) -> None:
        for observer in list(self._observers):
            try:
                getattr(observer, event)(*arguments)
            except OSError as error:
                self._observers.remove(observer)
                tqdm.write(f"{type(observer).__name__}: cannot write ({error}); training goes on without it")


def gpu_memory_gb(device: torch.device) -> dict[str, float]:
    """The most memory that tensors took on a GPU so far, in GB (10^9 bytes); nothing on a CPU. No sync."""
    if device.type != "cuda":
        return {}
    return {"gpu_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}
