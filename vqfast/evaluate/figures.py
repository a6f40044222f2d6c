"""Pictures of results: grids of images, pixel for pixel, and curves of a training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _GREY = (255, 255, 255), (32, 36, 44), (110, 118, 130)
HIDDEN = (196, 206, 222)
FINE = (255, 120, 30)  # tint of cells with many codes
_CELL = 72  # pixels a side that small images are enlarged to, at most
_GAP, _MARGIN = 4, 20


def _font(size: int, text: str) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own has little beyond ASCII, which names of classes need not keep to; matplotlib's has accents, Greek,
    Cyrillic, Arabic."""
    if text.isascii():
        return ImageFont.load_default(size)
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def save_grid(
    path: Path,
    rows: Sequence[np.ndarray],
    *,
    title: str,
    subtitle: str = "",
    labels: Sequence[str] = (),
    group: int = 1,
) -> None:
    """Images in rows, under a title, enlarged by a whole factor so that each pixel stays a square.

    Args:
        path: PNG file to write.
        rows: each (M, H, W, 1 or 3) uint8; all images of one size.
        title, subtitle: lines above the grid.
        labels: a text to the left of each row.
        group: rows that belong together: after each such number of rows the gap is wider.
    """
    height, width = rows[0].shape[1:3]
    scale = max(1, _CELL // max(height, width))
    cell_h, cell_w = height * scale, width * scale
    title_font, text_font = (_font(size, title + subtitle + "".join(labels)) for size in (22, 15))
    label_width = int(max((text_font.getlength(text) for text in labels), default=0))
    left = _MARGIN + (label_width + 12 if label_width else 0)
    top = _MARGIN + 34 + (26 if subtitle else 0)
    group_gap = 0 if group == 1 else 3 * _GAP
    groups = -(-len(rows) // group)

    columns = max(len(row) for row in rows)
    text_width = max(title_font.getlength(title), text_font.getlength(subtitle))
    total_w = max(left + columns * (cell_w + _GAP) - _GAP, _MARGIN + int(text_width)) + _MARGIN
    total_h = top + len(rows) * (cell_h + _GAP) - _GAP + (groups - 1) * group_gap + _MARGIN
    sheet = Image.new("RGB", (total_w, total_h), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 4), title, font=title_font, fill=_INK)
    draw.text((_MARGIN, _MARGIN + 28), subtitle, font=text_font, fill=_GREY)
    for r, row in enumerate(rows):
        y = top + r * (cell_h + _GAP) + (r // group) * group_gap
        if r < len(labels):
            draw.text((left - 12, y + cell_h // 2), labels[r], font=text_font, fill=_INK, anchor="rm")
        for c, pixels in enumerate(row):
            image = Image.fromarray(as_rgb(pixels)).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(image, (left + c * (cell_w + _GAP), y))
    sheet.save(path)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """(..., 1 or 3) uint8 to (..., 3)."""
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:-1], 3)))


def hide(images: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 1 or 3) uint8 as RGB with a flat colour where `hidden` (N, H, W) is true."""
    return np.where(hidden[..., None], np.array(HIDDEN, dtype=np.uint8), as_rgb(images))


def draw_grains(images: np.ndarray, grains: np.ndarray) -> np.ndarray:
    """Images with their grain map over them: the more codes a cell has, the stronger its tint; codes are outlined.

    Args:
        images: (N, H, W, 1 or 3) uint8.
        grains: (N, Hc, Wc) integers, 0 the coarsest.

    Returns:
        (N, H, W, 3) uint8. Outlines are left out where codes are smaller than 8 pixels.
    """
    images = as_rgb(images).astype(float)
    cell = images.shape[1] // grains.shape[1]
    grains = grains.repeat(cell, 1).repeat(cell, 2)
    strength = 0.45 * grains[..., None] / max(grains.max(), 1)
    tinted = images * (1 - strength) + np.array(FINE) * strength
    pixels = cell // 2**grains  # a side of a code
    y, x = np.arange(images.shape[1])[:, None], np.arange(images.shape[2])
    edge = ((y % pixels == 0) | (x % pixels == 0)) & (pixels >= 8)
    return np.where(edge[..., None], tinted * 0.6, tinted).round().astype(np.uint8)


@dataclass(frozen=True)
class Line:
    """Points (x, y) under a name, joined where there is more than one."""

    name: str
    points: Sequence[tuple[float, float]]
    marker: str = "o"


def save_lines(path: Path, lines: Sequence[Line], *, title: str, x: str, y: str) -> None:
    """One panel of lines. x, y: labels of the axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for line in lines:
        axis.plot(*zip(*line.points, strict=True), marker=line.marker, linewidth=1.6, markersize=6, label=line.name)
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


@dataclass(frozen=True)
class Panel:
    """One scalar of one training: `metrics` is its metrics.jsonl, `unit` the label of the vertical axis."""

    title: str
    metrics: Path
    scalar: str
    unit: str
    log: bool = False


def save_curves(path: Path, panels: Sequence[Panel]) -> None:
    """Curves side by side: training as a line (the median of five records, the records themselves faint behind it) and
    held-out values as dots. Scalars of a logarithmic panel must be above 0.

    Args:
        path: PNG file to write.
        panels: what to show.
    """
    # The object interface: pyplot would choose a display and keep state for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        records = [json.loads(line) for line in panel.metrics.read_text().splitlines()]
        steps, values = _points(records, panel.scalar)
        middle = _running_median(values)
        if not len(steps):
            raise ValueError(f"{panel.metrics}: holds no {panel.scalar}")
        axis.plot(steps, values, color="C0", alpha=0.25, linewidth=1)
        axis.plot(steps, middle, color="C0", linewidth=1.6, label="training")
        # Outliers of single records may leave the panel, so that the curves fill it.
        axis.set_yscale("log" if panel.log else "linear")
        seen = middle
        steps, values = _points(records, f"held_out/{panel.scalar}")
        # What only training knows, such as the weight of the discriminator, is 0 in the look at held-out images.
        if values.any():
            axis.plot(steps, values, "o--", color="C1", linewidth=1.4, markersize=4, label="held out")
            seen = np.concatenate([middle, values])
        low, high = seen.min(), seen.max()
        margin = 0.03 * (high - low) or 0.5
        limits = (low / 1.15, high * 1.15) if panel.log else (low - margin, high + margin)
        axis.set(title=panel.title, xlabel="step", ylabel=panel.unit, ylim=limits)
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def save_usage(path: Path, counts: np.ndarray) -> None:
    """How evenly a codebook is used: the share of each code, the most used first, beside even use.

    Args:
        path: PNG file to write.
        counts: (K,) how often each code is used, at least 0.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = np.sort(counts)[::-1] / max(counts.sum(), 1e-12)
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.stairs(shares, np.arange(len(shares) + 1), fill=True, color="C0", alpha=0.75, label="share of each code")
    axis.axhline(1 / len(shares), color="C1", linestyle="--", linewidth=1.4, label="even use")
    axis.set(
        title="Codebook", xlabel="code, the most used first", ylabel="share", xlim=(0, len(shares)), ylim=(0, None)
    )
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def _points(records: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(record["step"], record[name]) for record in records if name in record]
    return tuple(np.array(found, dtype=float).reshape(-1, 2).T)


def _running_median(values: np.ndarray, reach: int = 2) -> np.ndarray:
    """Median over `reach` values to each side, fewer at the ends."""
    return np.array([np.median(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))])
