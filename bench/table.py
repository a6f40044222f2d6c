"""The figures as Markdown: `python -m bench.table` prints them, `--readme` puts them between README's markers.

One line an op and size: vqfast's fastest backend against the fastest peer that was right. `--all` lists every row.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.case import PEER, VQFAST
from bench.rows import BUSY, OK, RESULTS, Row, read
from bench.sources import KERNELS, ROOT

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size or unit == "µs":
            return f"{value / size:.3g} {unit}"
    raise AssertionError


def size(value: int | None) -> str:
    if value is None:
        return "–"
    return "< 1 MB" if value < 1e6 else f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.1f} GB"


def _mismatches(row: Row) -> str:
    return "–" if row.mismatches is None else str(row.mismatches)


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def groups(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Rows that competed: the same op, size, dtype, threads and clock; smaller sizes first."""
    found = defaultdict(list)
    for row in rows:
        found[row.op, row.shape, row.dtype, row.threads, row.clock].append(row)

    def order(group: tuple) -> tuple:
        op, shape, *rest = group
        return list(KERNELS).index(op), [int(number) for number in re.findall(r"\d+", shape)], *rest

    return {group: found[group] for group in sorted(found, key=order)}


def best(rows: Iterable[Row], role: str) -> Row | None:
    """The fastest row of a role that was right; vqfast's definition is the fallback, not an answer."""
    timed = [row for row in rows if row.role == role and row.status == OK and row.backend != "vqfast reference"]
    return min(timed, key=lambda row: row.median_s, default=None)


def summary(rows: Sequence[Row]) -> str:
    """One line a group."""
    lines = []
    for (op, shape, dtype, _, clock), group in groups(rows).items():
        ours, peer = best(group, VQFAST), best(group, PEER)
        if ours is None:
            continue
        name = ours.backend.removeprefix("vqfast ")
        time = f"STALE {seconds(ours.median_s)}" if ours.stale else seconds(ours.median_s)
        dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype)
        ratio = peer.median_s / ours.median_s if peer is not None else None
        lines.append(
            [
                f"{op} {shape} {dtype}" + (f", {clock}" if clock != "wall" else ""),
                f"{time} ({name})",
                "–" if peer is None else f"{seconds(peer.median_s)} ({peer.backend})",
                "–" if ratio is None else f"{ratio:.2g}×" if ratio < 10 else f"{ratio:.0f}×",
                size(ours.peak_bytes),
                "–" if peer is None else size(peer.peak_bytes),
                _mismatches(ours) + " / " + ("–" if peer is None else _mismatches(peer)),
            ]
        )
    header = ["op and size", "vqfast", "fastest peer", "ratio", "memory", "peer's memory", "wrong rows, ours / peer's"]
    return _markdown(header, lines)


def everything(rows: Sequence[Row]) -> str:
    """Every row, fastest first in each group; what was wrong or failed last, without a time."""
    lines = []
    for (op, shape, dtype, _, clock), group in groups(rows).items():
        for row in sorted(group, key=lambda row: (row.median_s is None, row.median_s or 0)):
            reached = f"{row.floor_s / row.median_s:.0%}" if row.floor_s and row.median_s else "–"
            time = seconds(row.median_s) if row.status == OK else f"{row.status}: {row.note}"
            lines.append(
                [
                    f"{op} {shape} {dtype} {clock}",
                    row.backend + (" STALE" if row.stale else ""),
                    time,
                    seconds(row.iqr_s),
                    "–" if row.ratio_to_best_peer is None else f"{row.ratio_to_best_peer:.2f}",
                    reached,
                    size(row.peak_bytes),
                    _mismatches(row),
                ]
            )
    header = ["op and size", "contender", "median", "IQR", "best peer / this", "of the floor", "memory", "wrong rows"]
    return _markdown(header, lines)


def report(paths: Iterable[Path], *, full: bool = False) -> str:
    """A table a device, with what it was measured on above it."""
    parts = []
    for path in paths:
        rows = read(path)
        if not rows:
            continue
        newest = max(rows, key=lambda row: row.date)
        threads = f", {newest.threads} threads" if newest.clock == "wall" else ""
        title = f"{newest.device}{threads}; {newest.date}, commit {newest.commit or 'unknown'}."
        stale = sum(row.stale for row in rows)
        if stale:
            title += f" STALE: the kernel has changed since ({stale} rows); `make bench` measures it again."
        busy = sum(row.note.startswith(BUSY) for row in rows)
        if busy:
            title += f" BUSY: {busy} rows were taken while other programs ran; take them again on an idle machine."
        parts.append(f"{title}\n\n{everything(rows) if full else summary(rows)}")
    return "\n\n".join(parts)


def write_between(path: Path, text: str) -> None:
    """Replace what stands between the markers of a file.

    Raises:
        ValueError: the file has no such markers.
    """
    old = path.read_text()
    start, end = old.find(BEGIN), old.find(END)
    if start < 0 or end < start:
        raise ValueError(f"{path}: expected the lines {BEGIN} and {END}")
    path.write_text(f"{old[: start + len(BEGIN)]}\n{text}\n{old[end:]}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="CSV files (default: all of bench/results)")
    parser.add_argument("--all", action="store_true", help="every contender, not only the fastest of each side")
    parser.add_argument("--readme", action="store_true", help="write into README.md instead of printing")
    args = parser.parse_args(argv)
    text = report(args.files or sorted(RESULTS.glob("*.csv")), full=args.all)
    write_between(ROOT / "README.md", text) if args.readme else print(text)


if __name__ == "__main__":
    main()
