"""Do codes of variable length reconstruct better than as many of fixed length, and routed ones better than random ones?

What DQ-VAE claims (Huang et al. 2023, arXiv 2305.11718), measured with networks of one make: the same widths, training
images, steps and seed; nothing but the choice of grains differs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast.data import to_float
from vqfast.evaluate.claims import Claim
from vqfast.models.dqvae import DQVAE, DQVAEConfig
from vqfast.nn.routers import code_lengths

_BATCH = 64  # crops at once where nothing is learned


class FixedGrid(DQVAE):
    """A DQ-VAE's networks around a square grid of codes with any number of codes a side.

    Both features, brought to the grid, are added; the codes are brought back to the finest grid by interpolation. So it
    may use all that the dynamic model has.

    Args:
        config: of the networks.
        side: codes a side.
    """

    def __init__(self, config: DQVAEConfig, side: int):
        super().__init__(replace(config, router="fixed"))
        self.side = side

    def _codes(self, images: Tensor, freeze_codebook: bool) -> tuple[Tensor, Tensor]:
        h = sum(_resized(feature, self.side) for feature in self.features(images))
        quantized, _, loss = self.quantizer(self.quant_proj(h.movedim(1, -1)), freeze_codebook=freeze_codebook)
        quantized = _resized(quantized.movedim(-1, 1), self.config.fine_grid_size)
        return self._decode(quantized.movedim(1, -1)), loss

    def _model_step(self, images: Tensor, step: int) -> dict[str, Tensor]:
        output, commitment = self._codes(images, freeze_codebook=False)
        return {"loss": self._image_terms(images, output, step).loss + commitment}

    def reconstruct(self, images: Tensor, **_) -> Tensor:
        return self._codes(images, freeze_codebook=True)[0]


def _resized(x: Tensor, side: int) -> Tensor:
    """(B, C, H, H) to (B, C, side, side): means of areas where smaller, else interpolated."""
    if side <= x.shape[-1]:
        return F.adaptive_avg_pool2d(x, side)
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Contestant:
    """One way to choose codes.

    name: for tables.
    codes: number of codes an image, or wanted on average.
    make: a fresh model.
    target_codes: numbers of codes at which it is measured beside its own.
    """

    name: str
    codes: int
    make: Callable[[], DQVAE]
    target_codes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Result:
    """What a contestant reached on held-out images.

    errors: (N,) mean squared error of each, values in [-1, 1].
    lengths: (N,) codes of each.
    curve: (codes, mean error) at other numbers of codes.
    """

    name: str
    errors: Tensor
    lengths: Tensor
    curve: list[tuple[int, float]]

    @property
    def psnr(self) -> float:
        """Of the mean error, dB; the peak is 2."""
        return float(10 * torch.log10(4 / self.errors.mean()))


def contestants(config: DQVAEConfig, side: int) -> list[Contestant]:
    """Those that are compared at side * side codes, and the two ends of fixed length.

    Raises:
        ValueError: a number of codes that two grains cannot reach.
    """
    coarse, fine = config.grid_size, config.fine_grid_size
    cells, codes = coarse**2, side * side
    if config.grains != 2 or not coarse < side < fine or (codes - cells) % 3:
        reachable = [s for s in range(coarse + 1, fine) if (s * s - cells) % 3 == 0]
        raise ValueError(f"side: expected one of {reachable}, whose square two grains can reach, got {side}")
    share = (codes - cells) / (3 * cells)
    dynamic = replace(config, shares=(share,))
    steps = tuple(cells + 3 * round(cells * portion / 6) for portion in range(7))

    def fixed(side: int) -> Contestant:
        return Contestant(f"fixed, {side} x {side}", side * side, lambda: FixedGrid(config, side))

    def routed(name: str, targets: tuple[int, ...] = (), **options) -> Contestant:
        return Contestant(name, codes, lambda: DQVAE(replace(dynamic, **options)), targets)

    return [
        fixed(coarse),
        fixed(side),
        fixed(fine),
        routed("entropy router", steps, router="entropy", entropy_per="image"),
        routed("feature router", steps, router="feature"),
        routed("random grains", router="random"),
    ]


def fit(model: DQVAE, images: np.ndarray, crop: int, steps: int, batch_size: int, lr: float, seed: int, tick) -> DQVAE:
    """Train on random crops, the same for the same seed.

    Args:
        model: on the device to compute on.
        images: (N, H, W, C) uint8, H and W at least `crop`.
        tick: called after each step.
    """
    draw, device = np.random.default_rng(seed), next(model.parameters()).device
    player = torch.optim.AdamW(model.part_parameters("model"), lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(player, lr, total_steps=steps + 1, pct_start=0.1)
    model.train()
    for step in range(steps):
        chosen = draw.integers(len(images), size=batch_size)
        top, left = (draw.integers(images.shape[axis] - crop + 1, size=batch_size) for axis in (1, 2))
        batch = np.stack([images[i, y : y + crop, x : x + crop] for i, y, x in zip(chosen, top, left, strict=True)])
        loss = model.training_step({"image": to_float(batch).to(device)}, step)["loss"]
        player.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.part_parameters("model"), 1.0)
        player.step()
        schedule.step()
        tick()
    return model.eval()


@torch.no_grad()
def measure(contestant: Contestant, model: DQVAE, images: Tensor) -> tuple[Result, Tensor, Tensor | None]:
    """What a model makes of held-out images (N, C, H, W), its reconstructions, and its grains where it has some.

    Images and results are on the CPU, whatever the model's device.
    """
    errors = lambda output: (output.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    if isinstance(model, FixedGrid):
        output = _reconstructed(model, images)
        lengths = torch.full((len(images),), contestant.codes)
        return Result(contestant.name, errors(output), lengths, []), output, None
    # At the number of codes that is compared: a learned router is free to use another.
    device = next(model.parameters()).device
    encoded = [model.encode(part.to(device), target_codes=contestant.codes) for part in images.split(_BATCH)]
    grains = torch.cat([part.grains.cpu() for part in encoded])
    output = torch.cat([model.decode_codes(part).cpu() for part in encoded])
    curve = [(n, float(errors(_reconstructed(model, images, target_codes=n)).mean())) for n in contestant.target_codes]
    return Result(contestant.name, errors(output), code_lengths(grains), curve), output, grains


def _reconstructed(model: DQVAE, images: Tensor, **options) -> Tensor:
    device = next(model.parameters()).device
    return torch.cat([model.reconstruct(part.to(device), **options).cpu() for part in images.split(_BATCH)])


def compare(text: str, better: Result, worse: Result) -> Claim:
    """The claim that `better` has the lower error."""
    difference = worse.errors.double() - better.errors.double()
    deviation = difference.std() / len(difference) ** 0.5
    return Claim(text, float(difference.mean()), float(deviation), float((difference > 0).double().mean()))
