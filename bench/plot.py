"""Charts of a device's rows: `python -m bench.plot` draws docs/bench-<device>.png for each file of bench/results.

One panel an op and size: each contender's speed relative to the fastest peer (1 is that peer), on a log scale. vqfast
is in colour, hatched where STALE; a contender that was wrong has a note instead of a bar. Where rows have a floor
(GPU), the label says what share of it each one reaches.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.case import VQFAST, YARDSTICK
from bench.rows import OK, RESULTS, Row, read
from bench.sources import ROOT
from bench.table import groups, seconds

_COLOURS = {VQFAST: "#c2410c", YARDSTICK: "#cbd5e1"}
_PEER_COLOUR = "#64748b"
_CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
_COLUMNS = 2


def _panel(axes, title: str, rows: Sequence[Row], places: int) -> None:
    from matplotlib.ticker import NullFormatter

    timed = sorted((row for row in rows if row.status == OK and row.ratio_to_best_peer), key=lambda row: row.median_s)
    wrong = [row for row in rows if row.status != OK]
    labels = []
    lowest = min((row.ratio_to_best_peer for row in timed), default=1)
    for y, row in enumerate(timed + wrong):
        labels.append(row.backend + (" STALE" if row.stale else ""))
        if row.status != OK:
            axes.text(lowest * 0.52, y, f"{row.status}: {row.note}", va="center", fontsize=7, color="#991b1b")
            continue
        axes.barh(
            y,
            row.ratio_to_best_peer - lowest / 2,
            left=lowest / 2,
            color=_COLOURS.get(row.role, _PEER_COLOUR),
            hatch="////" if row.stale else None,
            edgecolor="white",
        )
        text = seconds(row.median_s)
        if row.floor_s:
            text += f", {row.floor_s / row.median_s:.0%} of the floor"
        if row.mismatches:
            text += f", {row.mismatches} wrong rows"
        axes.text(row.ratio_to_best_peer * 1.04, y, text, va="center", fontsize=7, bbox=_CLEAR)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", linewidth=0.8, zorder=0)
    highest = max((row.ratio_to_best_peer for row in timed), default=1)
    axes.set_xlim(lowest / 2, highest * (highest / lowest * 2) ** 0.6)
    axes.set_ylim(places - 0.4, -0.6)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(title, fontsize=9 if len(title) < 60 else 7.5, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def draw(path: Path, folder: Path) -> Path | None:
    """The chart of one CSV file; None where it has no rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read(path)
    if not rows:
        return None
    panels = list(groups(rows).items())
    heights = [max(len(group) for _, group in panels[i : i + _COLUMNS]) for i in range(0, len(panels), _COLUMNS)]
    figure, grid = plt.subplots(
        len(heights),
        _COLUMNS,
        figsize=(14, 0.22 * sum(heights) + 0.75 * len(heights) + 0.5),
        height_ratios=heights,
        squeeze=False,
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for i, (axes, ((op, shape, dtype, _, clock), group)) in enumerate(zip(grid.flat, panels, strict=False)):
        title = f"{op}  {shape}  {dtype}" + (f"  ({clock})" if clock != "wall" else "")
        _panel(axes, title, group, heights[i // _COLUMNS])
    newest = max(rows, key=lambda row: row.date)
    threads = f", {newest.threads} threads" if newest.clock == "wall" else ""
    figure.suptitle(
        f"Speed relative to the fastest peer (log scale): {newest.device}{threads}, {newest.date}", fontsize=11
    )
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"bench-{path.stem}.png"
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="CSV files (default: all of bench/results)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the charts (default: docs)")
    args = parser.parse_args(argv)
    for path in args.files or sorted(RESULTS.glob("*.csv")):
        print(draw(path, args.out) or f"{path}: no rows")


if __name__ == "__main__":
    main()
