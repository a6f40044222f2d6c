"""The effect that ReFiT is for (arXiv 2112.01799): a learned codebook dies while a VQGAN trains; rebuilt, it lives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vqfast.data import ImageBatches, ImageData, open_dataset
from vqfast.evaluate import codebook_usage, psnr
from vqfast.models.refit import collect_vectors, rebuild_codebook
from vqfast.models.vqgan import VQGAN, VQGANConfig

FASHION = Path(__file__).resolve().parents[3] / "shared" / "data" / "t10k-images-idx3-ubyte.gz"


def play(model: nn.Module, images: ImageBatches, steps: int, lr: float) -> nn.Module:
    """Train every part in turn, as the trainer does."""
    model.train()
    players = {part: torch.optim.Adam(model.part_parameters(part), lr, (0.5, 0.9)) for part in model.training_parts}
    draws = np.random.default_rng(0)
    for step in range(steps):
        batch = images[draws.integers(len(images), size=32)]
        for part, player in players.items():
            loss = model.training_step(batch, step, part)["loss"]
            model.zero_grad()
            loss.backward()
            player.step()
    return model.eval()


@torch.no_grad()
def look(model: VQGAN, data: ImageData) -> tuple[float, float]:
    """Share of the codes used at least 10 times by the held-out images, and their mean PSNR in dB."""
    held_out = ImageBatches(data, "held-out")
    images = held_out[np.arange(len(held_out))]["image"]
    codes = torch.cat([model.encode(part) for part in images.split(256)])
    results = torch.cat([model.decode_codes(part) for part in codes.split(256)])
    size = model.config.codebook_size
    return codebook_usage(codes, size, times=10), psnr(results.clamp(-1, 1), images).mean().item()


def repair(data: ImageData, codebook_size: int, steps: int, tuning: int) -> dict[str, tuple[float, float]]:
    torch.manual_seed(0)
    images = ImageBatches(data)
    config = VQGANConfig(
        image_size=data.image_size[0],
        in_channels=1,
        channels=32,
        mults=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(),
        codebook_size=codebook_size,
        code_dim=8,
        z_channels=32,
        disc_channels=16,
        disc_layers=1,
        disc_start=steps,
    )
    model = play(VQGAN(config), images, steps, 2e-3)
    found = {"before": look(model, data)}
    drawn = np.random.default_rng(0).integers(len(images), size=40 * codebook_size)
    batches = (images[part]["image"] for part in np.array_split(drawn, len(drawn) // 64))
    vectors = collect_vectors(model, batches, generator=torch.Generator().manual_seed(0))
    rebuilt = rebuild_codebook(model, vectors, codebook_size, generator=torch.Generator().manual_seed(0))
    found["rebuilt"] = look(rebuilt, data)
    found["after"] = look(play(rebuilt, images, tuning, 5e-4), data)
    return found


def check(found: dict[str, tuple[float, float]]) -> None:
    (used, before), (used_after, after) = found["before"], found["after"]
    assert used < 0.4, found
    assert used_after > 0.95, found
    assert after > before, found


def test_a_dead_codebook_lives_again():
    check(repair(open_dataset("digits"), 48, 60, 30))


@pytest.mark.slow
def test_a_dead_codebook_lives_again_on_photographs_of_clothes():
    if not FASHION.is_file():
        pytest.skip(f"{FASHION.name} is not beside the repository (../shared/data)")
    check(repair(open_dataset(FASHION, image_size=14), 256, 600, 300))
