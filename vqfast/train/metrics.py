"""metrics.jsonl: a line of scalars for every look at a training."""

import json
from pathlib import Path

METRICS_FILE = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; one that was cut by an interruption is left out."""
    path = run / METRICS_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def forget_after(run: Path, step: int) -> None:
    """Drop the lines of steps that will be taken again."""
    path = run / METRICS_FILE
    if not path.exists():
        return
    kept = [record for record in read_metrics(run) if record["step"] <= step]
    beside = path.with_name(f".{path.name}")
    beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
    beside.replace(path)
