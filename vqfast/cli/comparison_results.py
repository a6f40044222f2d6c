"""The files that `vqfast compare vqddm` and `generation` leave: figures of every training, tables, samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqfast.cli.bench import Bench, Make
from vqfast.cli.timed import TimedComparison
from vqfast.evaluate.claims import Claim, table
from vqfast.evaluate.equal_size import parameter_count
from vqfast.evaluate.figures import save_grid
from vqfast.evaluate.frechet import frechet_distance
from vqfast.evaluate.generation import Samples, Trained
from vqfast.train.runs import write_json

SHOWN = 16
_SIZES = {"parameters": "{:.0f}", "steps": "{:.0f}", "bits_per_code": "{:.2f}"}
_SAMPLES = {
    "frechet": "{:.2f}",
    "class_read": "{:.3f}",
    "copied": "{:.3f}",
    "ms_per_image": "{:.2f}",
    "tokens_per_image": "{:.1f}",
}


@dataclass(frozen=True)
class Table:
    """Words and figures by name, a row for each of what is compared.

    formats: the figures to show, such as {"psnr_db": "{:.2f}"}; those that the rows lack are left out. A list of
    numbers, one for each training, is shown as mean +- standard deviation.
    """

    rows: Sequence[Mapping[str, Any]]
    formats: Mapping[str, str]

    def lines(self) -> list[str]:
        """In Markdown."""
        words = [name for name, value in self.rows[0].items() if isinstance(value, str)]
        figures = [name for name in self.formats if name in self.rows[0]]
        lines = [f"| {' | '.join(words + figures)} |", "|" + "---|" * len(words + figures)]
        for row in self.rows:
            cells = [row[name] for name in words] + [_shown(row[name], self.formats[name]) for name in figures]
            lines.append(f"| {' | '.join(cells)} |")
        return lines


def _shown(value: Any, form: str) -> str:
    values = np.atleast_1d(value)
    mean = form.format(values.mean())
    return mean if len(values) == 1 else f"{mean} +- {form.format(values.std(ddof=1))}"


def sample_table(bench: Bench, trained: Mapping[str, Sequence[Trained]], **more: Callable[[Samples], float]) -> Table:
    """What was drawn, a row for each way of drawing; more: further figures of a training's samples."""
    figures = {
        "frechet": lambda drawn: frechet_distance(drawn.features, bench.real_features),
        "class_read": lambda drawn: float(drawn.right.mean()),
        "copied": lambda drawn: drawn.copied,
        "ms_per_image": lambda drawn: 1e3 * float(drawn.seconds.mean()),
    } | more
    return Table(
        [
            {"model": way} | {name: [figure(one.samples[way]) for one in trainings] for name, figure in figures.items()}
            for trainings in trained.values()
            for way in trainings[0].samples
        ],
        _SAMPLES,
    )


def describe_models(models: Mapping[str, Make], trained: Mapping[str, Sequence[Trained]]) -> dict[str, dict[str, Any]]:
    """What results.json says of each model."""
    return {
        name: {
            "parameters": parameter_count(*models[name]),
            "config": asdict(models[name][1]),
            "steps": [one.steps for one in trainings],
        }
        for name, trainings in trained.items()
    }


def write_results(
    out: Path, bench: Bench, models: dict[str, dict[str, Any]], tables: dict[str, Table], claims: list[Claim], note: str
) -> None:
    """results.json, with a value for each training, and results.md, with mean and deviation of them.

    Args:
        models: see `describe_models`.
        tables: by their names in results.json.
        note: what to know of them, below.
    """
    command, accuracy, floor = bench.command, bench.accuracy(), bench.floor()
    figures = {
        "models": models,
        "classifier_accuracy": accuracy,
        "frechet_of_reconstructions": floor,
        **{name: one.rows for name, one in tables.items()},
        "claims": [asdict(claim) | {"verdict": claim.verdict} for claim in claims],
    }
    write_json(out / "results.json", figures)
    lines = [
        f"{command.seeds} trainings of {60 * command.minutes:g} seconds each; {len(bench.real)} held-out images of "
        f"{command.data}; +- is the standard deviation over trainings. The classifier tells {accuracy:.1%} of the "
        f"held-out images. Reconstructions of training images have a Frechet distance of {floor:.2f}."
    ]
    sizes = Table([{"model": name} | described for name, described in models.items()], _SIZES)
    for one in (sizes, *tables.values()):
        lines += ["", *one.lines()]
    lines += ["", *table(claims, "resamples"), "", note]
    (out / "results.md").write_text("\n".join(lines) + "\n")


def print_results(command: TimedComparison, claims: list[Claim], models: dict[str, dict[str, Any]]) -> None:
    """The claims, and where to read more."""
    print("\n".join(f"{claim.verdict:>9}: {claim.text} ({claim.figures('resamples')})" for claim in claims))
    sizes = ", ".join(f"{described['parameters']} ({name})" for name, described in models.items())
    print(f"{command.out}: compared {command.seeds} trainings of each model; parameters: {sizes}; see results.md")


def save_samples(out: Path, bench: Bench, trained: Mapping[str, Sequence[Trained]], title: str) -> None:
    """samples.png, of the first training of each model, by each way; what is shown was not chosen."""
    ways = {way: drawn.images for trainings in trained.values() for way, drawn in trainings[0].samples.items()}
    rows = {"held out": bench.real} | ways
    save_grid(
        out / "samples.png",
        [images[:SHOWN] for images in rows.values()],
        title=title,
        subtitle=f"{60 * bench.command.minutes:g} seconds of training each; classes in turn",
        labels=list(rows),
    )
