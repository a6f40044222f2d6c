"""`vqfast compare dqvae`: the claims of DQ-VAE on real images, with small networks, in minutes on a CPU."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from vqfast.cli.options import OnDevice, check_out, pick_device
from vqfast.data import DataError, open_dataset, to_float, to_uint8
from vqfast.evaluate.claims import Claim, table
from vqfast.evaluate.dynamic_codes import Result, compare, contestants, fit, measure
from vqfast.evaluate.figures import Line, draw_grains, save_grid, save_lines
from vqfast.models.dqvae import DQVAEConfig
from vqfast.train import create_run
from vqfast.train.runs import write_json

SHOWN = 12


@dataclass(kw_only=True)
class CompareDQVAE(OnDevice):
    """Measure whether dynamic codes beat as many fixed ones, and routed grains random ones, on crops of your images."""

    data: str
    """Folder of images, .zip or .npz file."""
    out: Path
    """Folder to make: results.json, results.md, curve.png, grains.png."""
    image_size: int = 256
    """Resize images to this many pixels a side before they are cropped."""
    crop: int = 64
    """Pixels a side of a crop."""
    cell: int = 8
    """Pixels a side of a coarse code's cell, a power of two; a fine code's is half of it."""
    side: int = 11
    """Codes a side of the fixed grid that dynamic codes are compared with."""
    steps: int = 1000
    """Training steps of each network."""
    batch_size: int = 8
    """Crops a step."""
    lr: float = 2e-3
    """Highest learning rate."""
    channels: int = 32
    """Base width of the networks; a multiple of 32."""
    codebook_size: int = 256
    """Number of codes."""
    budget_weight: float = 0.5
    """Of the feature router's budget loss. The published 10 is for batches of 15 times as many cells, whose share
    varies a quarter as much by chance, and for an image loss with LPIPS; here it drowns what images are worth."""
    held_out: int = 192
    """Held-out crops to measure on."""
    seed: int = 0
    """Of weights, crops and grains."""

    def execute(self) -> None:
        check_out(self.out)
        for name, least in (("steps", 1), ("batch_size", 1), ("held_out", 2)):
            if getattr(self, name) < least:
                raise DataError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise DataError(f"--lr: expected a number above 0, got {self.lr}")
        data = open_dataset(self.data, image_size=self.image_size)
        if self.crop > self.image_size:
            raise DataError(f"--crop: expected at most {self.image_size} pixels (--image-size), got {self.crop}")
        if not data.held_out.any():
            raise DataError(f"{self.data}: expected enough images to hold some out, got {len(data)}")
        if self.cell < 2 or self.cell & (self.cell - 1) or self.crop % self.cell:
            expected = f"expected a power of two above 1 that divides the crop of {self.crop}"
            raise ValueError(f"cell: {expected}, got {self.cell}")
        device = pick_device(self.device)
        players = contestants(self.networks(data.channels), self.side)
        seen = data.images[data.indices("train")]
        unseen = _crops(data.images[data.indices("held-out")], self.crop, self.held_out)
        if len(unseen) < 2:
            raise DataError(f"{self.data}: expected at least 2 held-out crops, got {len(unseen)}")
        images, results, outputs, grains = to_float(unseen), [], {}, {}
        bar = tqdm(total=len(players) * self.steps, unit="step")
        with bar:
            for player in players:
                bar.set_description(player.name)
                torch.manual_seed(self.seed)
                model = player.make().to(device)
                fit(model, seen, self.crop, self.steps, self.batch_size, self.lr, self.seed, bar.update)
                result, outputs[player.name], grains[player.name] = measure(player, model, images)
                results.append(result)
        found = {result.name: result for result in results}
        fixed, random = found[f"fixed, {self.side} x {self.side}"], found["random grains"]
        claims = [
            compare(f"{name} reconstructs better than {other.name} at {self.side**2} codes", found[name], other)
            for other in (fixed, random)
            for name in ("entropy router", "feature router")
        ]
        settings = {key: value for key, value in asdict(self).items() if key != "out"}
        out = create_run(self.out, "compare_dqvae", {"settings": settings}).path
        _write(out, results, claims, settings)
        save_lines(
            out / "curve.png",
            _lines(results),
            title=f"Error against number of codes, {len(images)} held-out crops",
            x="codes an image",
            y="mean squared error",
        )
        names = ["entropy router", fixed.name, random.name]
        rows = [unseen[:SHOWN], draw_grains(unseen[:SHOWN], grains["entropy router"][:SHOWN].numpy())]
        rows.append(draw_grains(unseen[:SHOWN], grains["feature router"][:SHOWN].numpy()))
        rows += [to_uint8(outputs[name][:SHOWN]) for name in names]
        save_grid(
            out / "grains.png",
            rows,
            title="Where the codes go",
            subtitle=f"{self.side**2} codes an image; cells with four codes are tinted",
            labels=["original", "entropy grains", "feature grains", *names],
        )
        for claim in claims:
            print(f"{claim.verdict:>9}: {claim.text} ({claim.figures('images')})")
        print(f"{out}: compared {len(results)} models on {len(images)} held-out crops")

    def networks(self, in_channels: int) -> DQVAEConfig:
        """The make of all networks."""
        return DQVAEConfig(
            image_size=self.crop,
            in_channels=in_channels,
            channels=self.channels,
            mults=(1,) * self.cell.bit_length(),
            num_res_blocks=1,
            attention_resolutions=(),
            norm_groups=8,  # of at least 4 channels, as published: groups of one lose brightness and colour
            codebook_size=self.codebook_size,
            code_dim=32,
            z_channels=32,
            budget_weights=(self.budget_weight,),
            disc_weight=0.0,
        )


def _crops(images: np.ndarray, crop: int, count: int) -> np.ndarray:
    """At most `count` crops side by side, spread over the images: (n, crop, crop, C)."""
    rows, columns = images.shape[1] // crop, images.shape[2] // crop
    tiles = images[:, : rows * crop, : columns * crop].reshape(-1, rows, crop, columns, crop, images.shape[-1])
    tiles = tiles.swapaxes(2, 3).reshape(-1, crop, crop, images.shape[-1])
    return tiles[np.linspace(0, len(tiles) - 1, min(count, len(tiles))).round().astype(int)]


def _lines(results: list[Result]) -> list[Line]:
    fixed = [(int(r.lengths[0]), float(r.errors.mean())) for r in results if r.name.startswith("fixed")]
    lines = [Line("fixed grids, each trained for its own", sorted(fixed), marker="s")]
    for result in results:
        if result.curve:
            lines.append(Line(f"{result.name}, one training", result.curve, marker="o"))
        elif not result.name.startswith("fixed"):
            lines.append(Line(result.name, [(int(result.lengths[0]), float(result.errors.mean()))], marker="x"))
    return lines


def _write(out: Path, results: list[Result], claims: list[Claim], settings: dict) -> None:
    rows = [
        {
            "name": result.name,
            "codes": float(result.lengths.double().mean()),
            "mse": float(result.errors.mean()),
            "psnr_db": result.psnr,
            "curve": result.curve,
        }
        for result in results
    ]
    judged = [asdict(claim) | {"verdict": claim.verdict} for claim in claims]
    write_json(out / "results.json", {"settings": settings, "results": rows, "claims": judged})
    lines = ["| codes chosen by | codes an image | MSE | PSNR, dB |", "|---|---|---|---|"]
    lines += [f"| {row['name']} | {row['codes']:.0f} | {row['mse']:.5f} | {row['psnr_db']:.2f} |" for row in rows]
    lines += ["", *table(claims, "images")]
    (out / "results.md").write_text("\n".join(lines) + "\n")
