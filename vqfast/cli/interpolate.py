"""`vqfast interpolate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import Positional, arg

from vqfast.cli.encoding import BATCH, codes_of, decode, describe, images_for, labels_at
from vqfast.cli.generators import Sampling, load_generator, noise, same_classes, settings_of
from vqfast.cli.options import OfImages, OnDevice, check_out, pick_device
from vqfast.cli.sheets import spread
from vqfast.cli.words import several
from vqfast.evaluate.figures import save_grid
from vqfast.train import RunError, create_run


@dataclass(kw_only=True)
class Interpolate(Sampling, OnDevice, OfImages):
    """Draw what lies between two images: both are noised, their codes mixed, and a trained VQ-DDM denoises them."""

    run: Positional[Path]
    """Run of the VQ-DDM."""
    out: Path
    """Folder to make: interpolation.png, and interpolation.npz."""
    n: Annotated[int, arg(aliases=["-n"])] = 4
    """How many pairs, spread evenly over the split."""
    frames: int = 7
    """Images between those of a pair."""
    level: float = 0.5
    """How much noise, as a share of the model's noise levels: little keeps what both have, 1 forgets both."""
    unconditional: bool = False
    """Do not tell the model classes: that of the nearer image of the pair."""

    def execute(self) -> None:
        check_out(self.out)
        for name in ("n", "frames"):
            if getattr(self, name) < 1:
                raise RunError(f"--{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.level <= 1:
            raise RunError(f"--level: expected a share above 0, at most 1, got {self.level}")
        device = pick_device(self.device)
        model, autoencoder, classes = load_generator(self.run, device, "vqddm")
        data = images_for(self.data, autoencoder)
        chosen = spread(data.indices(self.split), 2 * self.n)
        if len(chosen) < 2:
            raise RunError(f"{self.data}: expected at least 2 images (--split {self.split}), got {len(chosen)}")
        pairs = chosen[: len(chosen) // 2 * 2].reshape(-1, 2)  # (n, 2)
        told = same_classes(data, self.run, classes, self.unconditional)
        level = max(round(self.level * model.config.T), 1)
        levels = level, f"of {self.run} up to --level {self.level:g}"
        arguments = self.arguments(model.interpolate, model, self.run, levels)

        first, second = (codes_of(autoencoder, data.images[positions]) for positions in pairs.T)
        generator, frames = noise(self.seed, device), []
        for weight in (np.arange(self.frames) + 1) / (self.frames + 1):
            labels = labels_at(data, pairs[:, int(weight >= 0.5)]) if told else None
            drawn = model.interpolate(
                first, second, labels, level=level, weight=float(weight), batch_size=BATCH, generator=generator,
                progress=True, **arguments,
            )  # fmt: skip
            frames.append(decode(autoencoder, drawn))
        results = np.stack(frames, 1)  # (n, frames, H, W, C)

        settings = settings_of(arguments) | {"split": self.split, "level": level}
        info = {"model": str(self.run), "data": describe(data), "seed": self.seed} | settings
        out = create_run(self.out, "interpolate", info).path
        ends = data.images[pairs]  # (n, 2, H, W, C)
        np.savez_compressed(out / "interpolation.npz", ends=ends, results=results, indices=pairs)
        rows = [np.concatenate([end[:1], between, end[1:]]) for end, between in zip(ends, results, strict=True)]
        subtitle = f"{self.split} images at the ends, noise level {level} of {model.config.T}"
        save_grid(out / "interpolation.png", rows, title="Interpolation", subtitle=subtitle)
        frames = several(self.frames, "image")
        print(f"{out}: drew {frames} between those of {several(len(pairs), 'pair')}")
