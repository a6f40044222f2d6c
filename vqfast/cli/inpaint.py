"""`vqfast inpaint`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tyro.conf import Positional, arg

from vqfast.cli.encoding import BATCH, decode, describe, images_for, labels_at
from vqfast.cli.generators import Decoding, load_generator, noise, same_classes
from vqfast.cli.masks import codes_around, hidden_cells, hidden_pixels
from vqfast.cli.options import OfImages, OnDevice, check_out, pick_device
from vqfast.cli.sheets import save_versions, spread
from vqfast.cli.words import several
from vqfast.evaluate.figures import hide
from vqfast.train import RunError, create_run


@dataclass(kw_only=True)
class Inpaint(Decoding, OnDevice, OfImages):
    """Hide a part of images and let a trained VQ-DDM draw it anew, or a raster-order GPT, which sees only what is above
    and to the left."""

    run: Positional[Path]
    """Run of the VQ-DDM or GPT."""
    out: Path
    """Folder to make: inpainting.png, and inpainting.npz."""
    seed: int = 0
    """Of the noise and of the random mask."""
    mask: Literal["centre", "left", "right", "top", "bottom", "random"] = "centre"
    """Which codes to hide: the middle, half of the grid, or half of its cells at random."""
    n: Annotated[int, arg(aliases=["-n"])] = 8
    """How many images, spread evenly over the split."""
    variations: int = 3
    """Results for each image."""
    unconditional: bool = False
    """Do not tell the model the images' classes."""

    def execute(self) -> None:
        check_out(self.out)
        if self.variations < 1:
            raise RunError(f"--variations: expected at least 1, got {self.variations}")
        device = pick_device(self.device)
        model, autoencoder, classes = load_generator(self.run, device, "vqddm", "raster_gpt")
        data = images_for(self.data, autoencoder)
        chosen = spread(data.indices(self.split), self.n)
        images, labels = data.images[chosen], None
        if same_classes(data, self.run, classes, self.unconditional):
            labels = labels_at(data, chosen).repeat_interleave(self.variations)

        cells = hidden_cells(self.mask, len(chosen), model.config.grid, self.seed)  # (N, h, w)
        hidden = hidden_pixels(cells, autoencoder.config.downsampling)
        drawn = model.inpaint(
            codes_around(autoencoder, images, hidden).repeat_interleave(self.variations, 0),
            cells.to(device).repeat_interleave(self.variations, 0),
            labels,
            batch_size=BATCH,
            generator=noise(self.seed, device),
            progress=True,
            **self.arguments(model.inpaint, model, self.run),
        )
        results = decode(autoencoder, drawn).reshape(len(chosen), self.variations, *images.shape[1:])
        # What was given stays as it was given, to the pixel.
        results = np.where(hidden[:, None, :, :, None], results, images[:, None])

        settings = {"mask": self.mask, "split": self.split, "steps": self.steps, "guidance": self.guidance}
        info = {"model": str(self.run), "data": describe(data), "seed": self.seed} | settings
        out = create_run(self.out, "inpaint", info).path
        np.savez_compressed(out / "inpainting.npz", original=images, hidden=hidden, results=results, indices=chosen)
        versions = {"original": images, "given": hide(images, hidden)}
        versions |= {f"result {i + 1}": result for i, result in enumerate(results.swapaxes(0, 1))}
        subtitle = f"{self.split} images, mask: {self.mask}"
        save_versions(out / "inpainting.png", versions, title="Inpainting", subtitle=subtitle)
        times = several(self.variations, "time")
        print(f"{out}: drew the hidden part of {several(len(chosen), 'image')} {times}")
