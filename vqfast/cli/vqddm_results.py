"""The files that `vqfast compare vqddm` leaves beside its pictures."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vqfast.cli.vqddm_bench import MASKS, Bench
from vqfast.evaluate.claims import Claim, table
from vqfast.evaluate.frechet import frechet_distance
from vqfast.evaluate.global_context import Trained
from vqfast.train.runs import write_json

BLIND = (
    "The raster transformer inpaints in raster order: codes that are given take their place in the sequence, each "
    "hidden one is drawn given all before it. It cannot see what is given further down; the VQ-DDM reads all of it."
)


def write_results(
    out: Path, bench: Bench, trained: dict[str, list[Trained]], claims: list[Claim], models: dict[str, Any]
) -> None:
    """results.json, with a value for each training, and results.md, with mean and deviation of them."""
    rows = []
    for trainings in trained.values():
        for way in trainings[0].samples:
            drawn = [one.samples[way] for one in trainings]
            rows.append(
                {
                    "model": way,
                    "frechet": [frechet_distance(one.features, bench.real_features) for one in drawn],
                    "class_read": [float(one.right.mean()) for one in drawn],
                    "copied": [one.copied for one in drawn],
                    "ms_per_image": [1e3 * float(one.seconds.mean()) for one in drawn],
                }
            )
    floor, true_codes = bench.limits()
    filled = [
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
    for name, trainings in trained.items():
        models[name] |= {"steps": [one.steps for one in trainings], "bits_per_code": [one.bits for one in trainings]}
    accuracy = bench.classifier.accuracy(bench.real, bench.real_labels.numpy())
    figures = {
        "models": models,
        "classifier_accuracy": accuracy,
        "frechet_of_reconstructions": floor,
        "samples": rows,
        "inpainting": filled,
        "claims": [asdict(claim) | {"verdict": claim.verdict} for claim in claims],
    }
    write_json(out / "results.json", figures)
    command = bench.command
    sizes = [{"model": name} | model for name, model in models.items()]
    lines = [
        f"{command.seeds} trainings of {60 * command.minutes:g} seconds each; {len(bench.real)} held-out images of "
        f"{command.data}; +- is the standard deviation over trainings. The classifier tells {accuracy:.1%} of the "
        f"held-out images. Reconstructions of training images have a Frechet distance of {floor:.2f}.",
        "",
        *_table(sizes, {"parameters": "{:.0f}", "steps": "{:.0f}", "bits_per_code": "{:.2f}"}),
        "",
        *_table(rows, {"frechet": "{:.2f}", "class_read": "{:.3f}", "copied": "{:.3f}", "ms_per_image": "{:.2f}"}),
        "",
        *_table(filled, {"psnr_db": "{:.2f}", "ssim": "{:.3f}", "class_read": "{:.3f}"}),
        "",
        *table(claims, "resamples"),
        "",
        f"bits_per_code is of held-out images whose class is known; the VQ-DDM's is a bound. {BLIND} The class is "
        f"{'told' if command.told else 'not told'} in inpainting; PSNR and SSIM are of whole images.",
    ]
    (out / "results.md").write_text("\n".join(lines) + "\n")


def _table(rows: list[dict[str, Any]], formats: dict[str, str]) -> list[str]:
    """Markdown; a list of numbers is shown as mean +- standard deviation."""
    words = [name for name in rows[0] if isinstance(rows[0][name], str)]

    def shown(value: Any, form: str) -> str:
        values = np.atleast_1d(value)
        mean = form.format(values.mean())
        return mean if len(values) == 1 else f"{mean} +- {form.format(values.std(ddof=1))}"

    lines = [f"| {' | '.join([*words, *formats])} |", "|" + "---|" * (len(words) + len(formats))]
    for row in rows:
        cells = [row[name] for name in words] + [shown(row[name], form) for name, form in formats.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
