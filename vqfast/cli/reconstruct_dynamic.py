"""`vqfast reconstruct` of a DQ-VAE: what is lost, with how many codes, and where these went."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vqfast.cli.training import check_channels, describe, pick_device
from vqfast.data import ImageBatches, open_dataset, to_float, to_uint8
from vqfast.evaluate import codebook_usage, perplexity, psnr, ssim
from vqfast.evaluate.figures import draw_grains, save_grid
from vqfast.models.dqvae import DQVAE
from vqfast.ops import pack
from vqfast.train import RunError, create_run, load_model
from vqfast.train.runs import write_json

COLUMNS = 8
BATCH = 32


class ReconstructCommand(Protocol):
    """What the command knows; see vqfast.cli.generate.Reconstruct."""

    run: Path
    data: str
    out: Path
    split: str
    n: int
    target_codes: int | None
    target_error: float | None
    device: str


def reconstruct_dynamic(command: ReconstructCommand) -> None:
    """Make the folder of the command: reconstruction.png with grain maps, and metrics.json."""
    model: DQVAE = load_model(command.run, "dqvae", pick_device(command.device))
    data = open_dataset(command.data, image_size=model.config.image_size)
    check_channels(data, model)
    targets = {"target_codes": command.target_codes, "target_error": command.target_error}
    grains, used, results = _through(model, ImageBatches(data, command.split), targets)
    originals = data.images[data.indices(command.split)]
    one, other, size = to_float(results), to_float(originals), model.config.codebook_size
    lengths = (4**grains).flatten(1).sum(1).double()
    metrics = {
        "split": command.split,
        "images": len(results),
        **{name: value for name, value in targets.items() if value is not None},
        "codes_mean": lengths.mean().item(),
        "codes_least": int(lengths.min()),
        "codes_most": int(lengths.max()),
        "psnr_db": psnr(one, other).mean().item(),
        "ssim": ssim(one, other).mean().item(),
        "codebook_size": size,
        "codebook_usage": codebook_usage(used, size),
        "perplexity": perplexity(used, size),
    }
    out = create_run(command.out, "reconstruct", {"model": str(command.run), "data": describe(data)}).path
    write_json(out / "metrics.json", metrics)
    shown = spread(np.arange(len(originals)), command.n)
    maps = draw_grains(originals[shown], grains[torch.from_numpy(shown)].numpy())
    rows = []
    for start in range(0, len(shown), COLUMNS):
        part = slice(start, start + COLUMNS)
        rows += [originals[shown][part], maps[part], results[shown][part]]
    save_grid(
        out / "reconstruction.png",
        rows,
        title="Reconstruction",
        subtitle=f"{len(originals)} {command.split} images, {metrics['codes_mean']:.0f} codes each: PSNR "
        f"{metrics['psnr_db']:.1f} dB, SSIM {metrics['ssim']:.3f}, {metrics['codebook_usage']:.0%} of codes used",
        labels=["original", "codes", "result"] * (len(rows) // 3),
        group=3,
    )
    print(f"{out}: {metrics['codes_mean']:.1f} codes an image, PSNR {metrics['psnr_db']:.2f} dB")


@torch.no_grad()
def _through(model: DQVAE, images: ImageBatches, targets: dict) -> tuple[Tensor, Tensor, np.ndarray]:
    """Grains (N, Hc, Wc), the codes of all images one after the other, and reconstructions (N, H, W, C) uint8."""
    device = next(model.parameters()).device
    grains, used, results = [], [], []
    for positions in tqdm(torch.arange(len(images)).split(BATCH), desc="encoding", unit="batch", leave=False):
        encoded = model.encode(images[positions.numpy()]["image"].to(device), **targets)
        packed = pack(encoded.codes, encoded.grains)
        grains.append(encoded.grains.cpu())
        used.append(packed.values[packed.grain_ids >= 0].cpu())
        results.append(to_uint8(model.decode_codes(encoded)))
    return torch.cat(grains), torch.cat(used), np.concatenate(results)


def spread(indices: np.ndarray, n: int) -> np.ndarray:
    """n of the indices, evenly spaced."""
    if n < 1:
        raise RunError(f"--n: expected at least 1, got {n}")
    return indices[np.linspace(0, len(indices) - 1, min(n, len(indices))).round().astype(int)]
