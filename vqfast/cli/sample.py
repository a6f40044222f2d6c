"""`vqfast sample`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import arg

from vqfast.cli.encoding import BATCH, decode
from vqfast.cli.generators import DynamicDecoding, choose_labels, load_generator, noise, settings_of
from vqfast.cli.options import OfRun, OnDevice, check_out, pick_device
from vqfast.cli.sheets import rows_of
from vqfast.cli.words import several
from vqfast.evaluate.figures import save_grid
from vqfast.train import RunError, create_run


@dataclass(kw_only=True)
class Sample(DynamicDecoding, OnDevice, OfRun):
    """Draw new images from a trained VQ-DDM, DQ-Transformer or raster-order GPT."""

    out: Path
    """Folder to make: samples.png, and samples.npz with images and labels."""
    n: Annotated[int, arg(aliases=["-n"])] = 64
    """How many images, spread evenly over the classes asked for."""
    labels: tuple[str, ...] = ()
    """Classes to draw, by name. Default: every class in turn."""
    grid: tuple[int, int] | None = None
    """VQ-DDM: rows and columns of codes, for images larger than it was trained on, which it sees through windows of its
    own size. Default: its own grid."""

    def execute(self) -> None:
        check_out(self.out)
        if self.n < 1:
            raise RunError(f"--n: expected at least 1, got {self.n}")
        device = pick_device(self.device)
        model, autoencoder, classes = load_generator(self.run, device)
        labels = choose_labels(self.labels, classes, self.n)
        arguments = self.arguments(model.sample, model, self.run)
        generator = noise(self.seed, device)
        drawn = model.sample(self.n, labels, batch_size=BATCH, generator=generator, progress=True, **arguments)
        codes, grains = drawn if isinstance(drawn, tuple) else (drawn, None)
        images = decode(autoencoder, codes)

        settings = settings_of(arguments)
        out = create_run(self.out, "sample", {"model": str(self.run), "seed": self.seed} | settings).path
        arrays = {"images": images, "codes": codes.cpu().numpy()}
        if grains is not None:
            arrays["grains"] = grains.cpu().numpy()
        if labels is not None:
            arrays["labels"] = np.array(classes)[labels.numpy()]
        np.savez_compressed(out / "samples.npz", **arrays)
        rows, names = rows_of(images, labels, classes)
        subtitle = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
        save_grid(out / "samples.png", rows, title="Samples", subtitle=subtitle, labels=names)
        print(f"{out}: drew {several(self.n, 'image')}")
