"""What `vqfast compare vqddm` leaves beside samples.png: figures, and pictures of what was filled in."""

from pathlib import Path

from vqfast.cli.bench import Make
from vqfast.cli.comparison_results import SHOWN, Table, describe_models, print_results, sample_table, write_results
from vqfast.cli.vqddm_bench import MASKS, VQDDMBench
from vqfast.evaluate.claims import Claim
from vqfast.evaluate.figures import hide, save_grid
from vqfast.evaluate.global_context import TrainedInpainter

BLIND = (
    "The raster transformer inpaints in raster order: codes that are given take their place in the sequence, each "
    "hidden one is drawn given all before it. It cannot see what is given further down; the VQ-DDM reads all of it."
)


def write_vqddm_results(
    out: Path,
    bench: VQDDMBench,
    models: dict[str, Make],
    trained: dict[str, list[TrainedInpainter]],
    claims: list[Claim],
) -> None:
    """results.json and results.md; the claims are printed too."""
    described = describe_models(models, trained)
    for name, trainings in trained.items():
        described[name]["bits_per_code"] = [one.bits for one in trainings]
    note = (
        f"bits_per_code is of held-out images whose class is known; the VQ-DDM's is a bound. {BLIND} The class is "
        f"{'told' if bench.command.told else 'not told'} in inpainting; PSNR and SSIM are of whole images."
    )
    tables = {"samples": sample_table(bench, trained), "inpainting": _inpainting_table(bench, trained)}
    write_results(out, bench, described, tables, claims, note)
    print_results(bench.command, claims, described)


def _inpainting_table(bench: VQDDMBench, trained: dict[str, list[TrainedInpainter]]) -> Table:
    true_codes = bench.true_codes()
    rows = [
        {
            "mask": mask,
            "model": name,
            "psnr_db": [float(one.psnr.mean()) for one in results],
            "ssim": [float(one.ssim.mean()) for one in results],
            "class_read": [float(one.right.mean()) for one in results],
        }
        for mask in MASKS
        for name, results in (
            *((name, [one.inpaintings[mask] for one in trainings]) for name, trainings in trained.items()),
            ("true codes", [true_codes[mask]]),
        )
    ]
    return Table(rows, {"psnr_db": "{:.2f}", "ssim": "{:.3f}", "class_read": "{:.3f}"})


def save_inpaintings(out: Path, bench: VQDDMBench, trained: dict[str, list[TrainedInpainter]]) -> None:
    """inpainting_MASK.png, of the first training of each model; what is shown was not chosen."""
    first = {name: trainings[0] for name, trainings in trained.items()}
    for mask in MASKS:
        save_grid(
            out / f"inpainting_{mask}.png",
            [
                bench.real[:SHOWN],
                hide(bench.real, bench.hidden(mask, bench.command.seed)[1])[:SHOWN],
                *(training.inpaintings[mask].images[:SHOWN] for training in first.values()),
            ],
            title=f"Inpainting, mask: {mask}",
            subtitle="the class is told" if bench.command.told else "the class is not told",
            labels=["truth", "given", *first],
        )
