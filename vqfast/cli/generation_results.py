"""What `vqfast compare generation` leaves beside samples.png: figures, and a picture of the grains drawn."""

from pathlib import Path

from vqfast.cli.bench import Make
from vqfast.cli.comparison_results import SHOWN, describe_models, print_results, sample_table, write_results
from vqfast.cli.generation_bench import GenerationBench
from vqfast.evaluate.claims import Claim
from vqfast.evaluate.figures import draw_grains, save_grid
from vqfast.evaluate.generation import Samples, Trained
from vqfast.nn.routers import code_lengths

NOTE = (
    "The claims are judged with the DQ-Transformer's first way of drawing; with the finest places derived, it draws no "
    "places for the codes of the finest grain but takes what coarser grains have left, in the order of training. The "
    "raster transformer draws the finest grid, on which a coarse code stands several times. Tokens are those of a "
    "sequence: codes, and the DQ-Transformer's start and end of each grain. A sample is a copy where all codes on the "
    "finest grid are those of a training image."
)


def write_generation_results(
    out: Path, bench: GenerationBench, models: dict[str, Make], trained: dict[str, list[Trained]], claims: list[Claim]
) -> None:
    """results.json and results.md; the claims are printed too."""
    c = bench.autoencoder.config

    def tokens(drawn: Samples) -> float:
        if drawn.grains is None:
            return float(c.fine_grid_size**2)
        return float(code_lengths(drawn.grains).double().mean()) + 2 * c.grains

    described = describe_models(models, trained)
    tables = {"samples": sample_table(bench, trained, tokens_per_image=tokens)}
    write_results(out, bench, described, tables, claims, NOTE)
    print_results(bench.command, claims, described)


def save_drawn_grains(out: Path, bench: GenerationBench, name: str, drawn: Samples) -> None:
    """grains.png: where the DQ-VAE puts its codes in real images, and where the model of this name does in its own."""
    rows, labels = [], []
    for images, grains, whose in (
        (bench.real[:SHOWN], bench.real_grains(SHOWN), ("held out", "grains of the DQ-VAE")),
        (drawn.images[:SHOWN], drawn.grains[:SHOWN], (name, "grains drawn")),
    ):
        # So large that codes are outlined.
        scale = -(-16 * grains.shape[1] // images.shape[1])
        images = images.repeat(scale, 1).repeat(scale, 2)
        rows += [images, draw_grains(images, grains.numpy())]
        labels += whose
    save_grid(
        out / "grains.png", rows, title="Where the codes go", subtitle="cells with more codes are tinted",
        labels=labels, group=2,
    )  # fmt: skip
