"""`vqfast reconstruct`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from tyro.conf import Positional, arg

from vqfast.cli.encoding import describe, images_for
from vqfast.cli.generators import load_autoencoder_of
from vqfast.cli.options import OfImages, OnDevice, VaryingLength, check_out, pick_device
from vqfast.cli.sheets import COLUMNS, save_versions, spread
from vqfast.data import ImageBatches, to_uint8
from vqfast.evaluate.evaluation import Judges, evaluate_reconstruction
from vqfast.evaluate.figures import draw_grains
from vqfast.models.dqvae import DynamicCodes
from vqfast.models.registry import kind_of
from vqfast.train import create_run
from vqfast.train.runs import write_json


@dataclass(kw_only=True)
class Reconstruct(VaryingLength, OnDevice, OfImages):
    """Send images through an autoencoder's codes and back: a picture, and how alike they are; see also evaluate."""

    run: Positional[Path]
    """Run of a VQ-VAE, VQGAN or DQ-VAE, or of a model of their codes, which holds its own."""
    out: Path
    """Folder to make: reconstruction.png and metrics.json."""
    n: Annotated[int, arg(aliases=["-n"])] = 32
    """How many to show; all of the split are measured."""

    def execute(self) -> None:
        check_out(self.out)
        autoencoder = load_autoencoder_of(self.run, pick_device(self.device))
        targets = self.targets(self.run, kind_of(autoencoder))
        data = images_for(self.data, autoencoder)
        images = ImageBatches(data, self.split)
        shown = spread(np.arange(len(images)), self.n)
        figures = evaluate_reconstruction(autoencoder, images, Judges(), progress=True, **targets)

        info = {"model": str(self.run), "data": describe(data)}
        out = create_run(self.out, "reconstruct", info).path
        write_json(out / "metrics.json", {"split": self.split} | targets | figures)
        versions = versions_of(autoencoder, images[shown]["image"], targets)
        count, psnr = f"{figures['codes_mean']:.0f} codes each", f"PSNR {figures['psnr_db']:.2f} dB"
        used = f"{figures['codebook_usage']:.1%} of {figures['codebook_size']} codes used"
        subtitle = f"{len(images)} {self.split} images, {count}: {psnr}, SSIM {figures['ssim']:.3f}, {used}"
        # Room for the outlines of codes.
        columns = COLUMNS // 2 if "codes" in versions else COLUMNS
        path = out / "reconstruction.png"
        save_versions(path, versions, title="Reconstruction", subtitle=subtitle, columns=columns)
        self.say_missed(figures)
        print(f"{out}: {count}, {psnr}, {used}")


@torch.no_grad()
def versions_of(autoencoder: nn.Module, images: Tensor, targets: dict[str, Any]) -> dict[str, np.ndarray]:
    """Images (n, C, H, W) in [-1, 1] beside what is left of them, and where the codes are if these vary in number."""
    given = images.to(next(autoencoder.parameters()).device)
    codes = autoencoder.encode(given, **targets)
    versions = {"original": to_uint8(images)}
    if isinstance(codes, DynamicCodes):
        versions["codes"] = draw_grains(versions["original"], codes.grains.cpu().numpy())
    return versions | {"result": to_uint8(autoencoder.decode_codes(codes))}
