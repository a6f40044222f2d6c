"""One HTML file that shows a run: figures against their targets, pictures, the commands that made them."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """A measured figure and the least that it should be.

    unit: written after the number; "%" shows value and target times 100.
    """

    name: str
    value: float
    target: float
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value >= self.target

    @property
    def verdict(self) -> str:
        return "met" if self.met else "MISSED"

    def show(self, value: float) -> str:
        return f"{value:.1%}" if self.unit == "%" else f"{value:.2f} {self.unit}".strip()


@dataclass(frozen=True)
class Picture:
    title: str
    text: str
    path: Path


def table(figures: Sequence[Figure]) -> str:
    """The figures as plain text: name, value, target, verdict."""
    rows = [("", "measured", "target", "")]
    rows += [(f.name, f.show(f.value), "≥ " + f.show(f.target), f.verdict) for f in figures]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"{name:<{widths[0]}}  {value:>{widths[1]}}  {target:>{widths[2]}}  {verdict}".rstrip()
        for name, value, target, verdict in rows
    )


def figure_table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values as a Markdown table that lines up as plain text."""
    rows = [("figure", "value"), *rows]
    left, right = (max(len(row[i]) for row in rows) for i in range(2))
    lines = [f"| {name:<{left}} | {value:>{right}} |" for name, value in rows]
    return "\n".join([lines[0], f"| {'-' * left} | {'-' * (right - 1)}: |", *lines[1:]])


def write_report(
    path: Path,
    *,
    title: str,
    introduction: str,
    figures: Sequence[Figure],
    pictures: Sequence[Picture],
    commands: Sequence[str],
    notes: Sequence[str] = (),
) -> None:
    """Write a page that needs nothing beside it: pictures are inside.

    Args:
        path: the .html file.
        title, introduction: its head.
        figures: measured figures, shown as a table.
        pictures: PNG files, in the order to show them.
        commands: what was run.
        notes: lines below the table.
    """
    rows = "".join(
        f"<tr><td>{_text(f.name)}</td><td class=number>{_text(f.show(f.value))}</td>"
        f"<td class=number>≥ {_text(f.show(f.target))}</td>"
        f"<td><span class={'met' if f.met else 'missed'}>{f.verdict}</span></td></tr>"
        for f in figures
    )
    measured = f"""<section><h2>Figures</h2>
<table><thead><tr><th></th><th class=number>measured</th><th class=number>target</th><th></th></tr></thead>
<tbody>{rows}</tbody></table>
{"".join(f"<p class=note>{_text(note)}</p>" for note in notes)}</section>"""
    sections = [measured, *map(_picture, pictures), _listing("Commands", "\n".join(commands))]
    _write_page(path, title, introduction, sections)


def write_run_report(
    path: Path,
    *,
    title: str,
    introduction: str,
    facts: dict[str, str],
    pictures: Sequence[Picture],
    settings: str,
) -> None:
    """Write a page about one training, that needs nothing beside it.

    Args:
        path: the .html file.
        title, introduction: its head.
        facts: what to know of the run, shown as a table.
        pictures: PNG files, in the order to show them.
        settings: text that repeats the run.
    """
    rows = "".join(f"<tr><td>{_text(name)}</td><td class=number>{_text(v)}</td></tr>" for name, v in facts.items())
    sections = [f"<section><h2>State</h2><table><tbody>{rows}</tbody></table></section>"]
    _write_page(path, title, introduction, [*sections, *map(_picture, pictures), _listing("Settings", settings)])


_text = html.escape


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f"<section><h2>{_text(picture.title)}</h2><p>{_text(picture.text)}</p>"
        f'<img alt="{_text(picture.title)}" src="data:image/png;base64,{data}"></section>'
    )


def _listing(title: str, lines: str) -> str:
    return f"<section><h2>{_text(title)}</h2><pre>{_text(lines)}</pre></section>"


def _write_page(path: Path, title: str, introduction: str, sections: Sequence[str]) -> None:
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{_text(title)}</title>
<style>{_STYLE}</style></head>
<body><main>
<h1>{_text(title)}</h1>
<p class=lead>{_text(introduction)}</p>
{"".join(sections)}
</main></body></html>
"""
    path.write_text(page, encoding="utf-8")


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f3f4f6; color: #20242c; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1440px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; margin: 0 0 8px; }
h2 { font-size: 19px; margin: 0 0 6px; }
.lead { max-width: 70ch; color: #4a5160; margin: 0 0 28px; }
section { background: #fff; border: 1px solid #e3e6ea; border-radius: 10px; padding: 22px 26px; margin: 0 0 22px; }
section p { margin: 0 0 14px; color: #4a5160; max-width: 80ch; }
img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; min-width: 60%; }
th, td { text-align: left; padding: 8px 18px 8px 0; border-bottom: 1px solid #eceef1; }
th { font-weight: 600; color: #6e7682; font-size: 14px; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.met, .missed { border-radius: 999px; padding: 2px 12px; font-size: 14px; font-weight: 600; }
.met { background: #dcf3e3; color: #12672f; }
.missed { background: #fde2e0; color: #a01c12; }
p.note { margin: 14px 0 0; font-size: 14px; }
pre { background: #f6f7f9; border-radius: 8px; padding: 14px 16px; overflow-x: auto; font-size: 13px; margin: 0; }
"""
