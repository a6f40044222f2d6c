"""The one schema of every figure, and the file that keeps them: bench/results/<device>.csv.

A row is replaced by a newer one of the same key; what it was before is in git.
"""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.sources import ROOT, kernel_hash

RESULTS = ROOT / "bench" / "results"
KEY = ("op", "backend", "shape", "dtype", "device", "threads", "clock")
OK, WRONG, FAILED = "ok", "wrong", "failed"
BUSY = "busy"  # begins the note of a row that was measured while other programs ran


@dataclass(frozen=True)
class Row:
    """One contender at one size. None is an empty cell.

    op, backend, role, shape, dtype, device: what ran; backend is the contender's name. threads: of the CPU,
    0 on a CUDA device.
    clock: wall (CPU), events (CUDA, launches included) or graph (CUDA, replay of a captured graph).
    status: ok; wrong (the result was wrong, so nothing was timed); failed. note: how; or that the machine was busy.
    median_s, iqr_s, rounds: seconds a call, median and interquartile range over the rounds.
    ratio_to_best_peer: the best peer's median over this one's; above 1 is faster than every peer.
    gbytes_per_s, gflops_per_s: the op's unavoidable bytes and operations over the median.
    floor_s: the least time that the device's measured ceilings allow.
    peak_bytes: memory beyond inputs and outputs at the worst moment.
    mismatches: discrete results that differ from the exact answer. error: relative, of real results.
    version: of the package that ran. commit, kernel_hash: of vqfast's source; date: ISO, UTC.
    """

    op: str
    backend: str
    role: str
    shape: str
    dtype: str
    device: str
    threads: int
    clock: str
    status: str
    note: str = ""
    median_s: float | None = None
    iqr_s: float | None = None
    rounds: int | None = None
    ratio_to_best_peer: float | None = None
    gbytes_per_s: float | None = None
    gflops_per_s: float | None = None
    floor_s: float | None = None
    peak_bytes: int | None = None
    mismatches: int | None = None
    error: float | None = None
    version: str = ""
    commit: str = ""
    kernel_hash: str = ""
    date: str = ""

    @property
    def key(self) -> tuple:
        return tuple(getattr(self, name) for name in KEY)

    @property
    def stale(self) -> bool:
        """Whether the kernel that this row measured has changed since."""
        return bool(self.kernel_hash) and self.kernel_hash != kernel_hash(self.backend, self.op)


_TYPES = {f.name: f.type for f in fields(Row)}


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(name: str, cell: str) -> object:
    kind = str(_TYPES[name])
    if cell == "" and "None" in kind:
        return None
    return int(cell) if "int" in kind else float(cell) if "float" in kind else cell


def read(path: Path) -> list[Row]:
    """Rows of a file, none where it does not exist.

    Raises:
        ValueError: other columns than those of Row.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        if table.fieldnames != list(_TYPES):
            raise ValueError(f"{path}: expected the columns {','.join(_TYPES)}, got {','.join(table.fieldnames or [])}")
        return [Row(**{name: _value(name, cell) for name, cell in line.items()}) for line in table]


def store(path: Path, rows: list[Row]) -> None:
    """Write rows into the file, in place of those of the same key."""
    merged = {row.key: row for row in read(path)} | {row.key: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(_TYPES), lineterminator="\n")
        table.writeheader()
        for row in sorted(merged.values(), key=lambda row: row.key):
            table.writerow({name: _cell(value) for name, value in asdict(row).items()})
