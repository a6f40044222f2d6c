"""`vqfast runs`, `vqfast report`, `vqfast share`: looking at runs and handing models on."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from vqfast.cli.options import check_out
from vqfast.cli.settings import CONFIG_FILE
from vqfast.evaluate.figures import Panel, save_curves, save_usage
from vqfast.evaluate.report import Picture, write_run_report
from vqfast.train import RunError, open_run
from vqfast.train.checkpoint import checkpoint_of, model_from, saved_checkpoints
from vqfast.train.evaluation import HELD_OUT, histograms_of
from vqfast.train.metrics import METRICS_FILE, read_metrics
from vqfast.train.observers import PICTURES
from vqfast.train.progress import read_progress
from vqfast.train.runs import RUN_FILE, Run

_PANELS_A_ROW = 3
_PANELS = 12
_NOT_DRAWN = ("step", "lr", "images_per_s", "gpu_memory_gb")


@dataclass
class Runs:
    """List the runs in a folder with their state."""

    folder: Positional[Path] = Path("runs")
    """Looked through with all folders in it."""

    def execute(self) -> None:
        if not self.folder.is_dir():
            raise RunError(f"{self.folder}: {'not a folder' if self.folder.exists() else 'no such folder'}")
        found = sorted(path.parent for path in self.folder.rglob(RUN_FILE))
        # A run may hold a copy of another that it needs.
        own = [run for run in found if not any(parent in found for parent in run.parents)]
        demos = [run for run in found if run.parent in own and _kind(run.parent) == "demo"]
        if not own:
            raise RunError(f"{self.folder}: holds no runs")
        rows = [("run", "kind", "state", "step", "loss", "created")]
        rows += [_row(run) for run in sorted(own + demos)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


@dataclass
class Report:
    """Draw one HTML page of a training: state, curves, pictures, settings."""

    run: Positional[Path]
    """Run of a training."""
    out: Path | None = None
    """The page. Default: report.html in the run."""

    def execute(self) -> None:
        run = open_run(self.run)
        records = _records(run.path)
        if not records:
            raise RunError(f"{run.path}: holds no metrics yet (it is a {run.kind} run)")
        page = self.out or run.path / "report.html"
        if self.out is not None and self.out.exists():
            raise RunError(f"{self.out}: exists; choose another --out")
        if not page.parent.is_dir():
            raise RunError(f"{page.parent}: no such folder")
        facts = _facts(run, records)
        with tempfile.TemporaryDirectory() as folder:
            curves = _curves(run, records, Path(folder))
            curves += _codebook(run, Path(folder))
            pictures = _pictures(run)
            settings = run.path / CONFIG_FILE
            write_run_report(
                page,
                title=f"{run.path.name}: {run.kind}",
                introduction="Lines: training batches (running median). Dots: held-out images, never trained on.",
                facts=facts,
                pictures=curves + pictures,
                settings=settings.read_text() if settings.is_file() else str(run.info.get("training", "")),
            )
        print(f"{page}: drawn from {len(records)} records")


@dataclass
class Share:
    """Write a folder with a trained model's weights, configuration and card, as Hugging Face's hub takes it."""

    run: Positional[Path]
    """Run of a training."""
    out: Path
    """Folder to make."""
    checkpoint: Literal["last", "best"] = "best"
    """Which weights: the newest, or those with the lowest loss on held-out images."""
    push: str | None = None
    """Also upload to this repository of the hub, "owner/name"."""

    def execute(self) -> None:
        from vqfast.train.hub import Pretrained

        check_out(self.out)
        run = open_run(self.run)
        found = checkpoint_of(run, self.checkpoint)
        records = [record for record in read_metrics(run.path) if record["step"] == found.step]
        figures = {name: v for record in records for name, v in record.items() if name.startswith(HELD_OUT)}
        drawn = sorted((run.path / PICTURES).glob("*.png"))
        shared = Pretrained(model_from(found), found.step, figures, drawn[-1] if drawn else None)
        shared.save_pretrained(self.out)
        if self.push:
            shared.push_to_hub(self.push)
        print(f"{self.out}: {found.kind} of step {found.step}")


def _records(run: Path) -> list[dict[str, float]]:
    try:
        return read_metrics(run)
    except ValueError as error:
        raise RunError(f"{run / METRICS_FILE}: not readable: {error}") from error


def _kind(run: Path) -> str:
    try:
        return open_run(run).kind
    except RunError:
        return ""


def _row(path: Path) -> tuple[str, ...]:
    try:
        run = open_run(path)
        progress = read_progress(path)
        losses = [record["loss"] for record in _records(path) if "loss" in record]
    except (ValueError, KeyError) as error:
        return str(path), "?", f"unreadable: {error}", "", "", ""
    state, step = _state(run)
    loss = f"{losses[-1]:.4g}" if losses else ""
    message = f" ({progress.message})" if progress and progress.message else ""
    return str(path), run.kind, state + message, step, loss, str(run.info.get("created", ""))[:16].replace("T", " ")


def _state(run: Run) -> tuple[str, str]:
    """State and "step of steps" of a run; of what was no training, "done"."""
    progress = read_progress(run.path)
    if progress is None:
        return ("new" if "training" in run.info else "done"), ""
    return progress.state, f"{progress.step} of {progress.steps}"


def _facts(run: Run, records: list[dict[str, float]]) -> dict[str, str]:
    state, step = _state(run)
    facts = {"state": state, "last checkpoint": step or "none", "created": str(run.info.get("created", ""))}
    facts["checkpoints kept"] = ", ".join(path.name for path in saved_checkpoints(run.path)) or "none"
    latest: dict[str, float] = {}
    for record in records:
        latest |= record
    return facts | {name: f"{value:.5g}" for name, value in latest.items() if name != "step"}


def _curves(run: Run, records: list[dict[str, float]], folder: Path) -> list[Picture]:
    """Panels of every scalar that training batches give, a few to a picture."""
    names = [name for name in dict.fromkeys(name for record in records for name in record) if name not in _NOT_DRAWN]
    names = [name for name in names if not name.startswith(HELD_OUT)]
    # Such as a perceptual loss that was not given: nothing to see.
    names = [name for name in names if any(record.get(name) for record in records)][:_PANELS]
    panels = [Panel(name, run.path / METRICS_FILE, name, name) for name in names]
    pictures = []
    for first in range(0, len(panels), _PANELS_A_ROW):
        path = folder / f"curves-{first}.png"
        part = panels[first : first + _PANELS_A_ROW]
        save_curves(path, part)
        pictures.append(Picture("Curves", ", ".join(panel.title for panel in part), path))
    return pictures


def _codebook(run: Run, folder: Path) -> list[Picture]:
    """Use of the codes, of a model that counts them in training; nothing where no checkpoint was made yet."""
    if not saved_checkpoints(run.path):
        return []
    counts = histograms_of(model_from(checkpoint_of(run))).get("codebook")
    if counts is None:
        return []
    path = folder / "codebook.png"
    save_usage(path, counts.flatten().double().cpu().numpy())
    return [Picture("Codebook", "How often training used each code of late: its moving average.", path)]


def _pictures(run: Run) -> list[Picture]:
    """The first evaluation's picture and the last one's, where there are any."""
    drawn = sorted((run.path / PICTURES).glob("*.png"))
    chosen = dict.fromkeys([*drawn[-1:], *drawn[:1]])
    return [Picture(f"Step {int(path.stem)}", "What the model does with held-out images.", path) for path in chosen]
