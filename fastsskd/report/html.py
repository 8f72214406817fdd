"""Pieces of a report's page. Whatever text comes in is escaped; what is already HTML says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 1rem; background: #f6f7f9; color: #1c2024;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 0.6rem; }
h3 { font-size: 1rem; margin: 1rem 0 0.4rem; }
section { background: #fff; border: 1px solid #dfe2e7; border-radius: 8px; padding: 1rem; margin: 0 0 1rem; }
p { margin: 0.3rem 0; overflow-wrap: anywhere; }
.status { display: inline-block; border-radius: 4px; padding: 0 0.5rem; color: #fff; background: #5b616b; }
.complete { background: #1f7a44; } .failed { background: #b3261e; } .stopped, .unfinished { background: #8a5a00; }
.problem { border-left: 4px solid #b3261e; background: #fdf0ef; padding: 0.4rem 0.7rem; margin: 0.4rem 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 1rem; }
.chart { margin: 0; min-width: 0; } .chart figcaption { font-weight: 600; font-size: 0.9rem; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: #3c424b; }
svg .grid { stroke: #e6e8ec; } svg .axis { stroke: #8a8f98; }
.legend { display: flex; flex-wrap: wrap; gap: 0 0.8rem; margin: 0; font-size: 0.8rem; color: #3c424b; }
.legend span { display: inline-flex; align-items: center; gap: 0.3rem; } .legend svg { width: 22px; height: 8px; }
.wide { overflow-x: auto; max-width: 100%; } svg.matrix { max-width: none; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #e6e8ec; white-space: nowrap; }
th { color: #5b616b; font-weight: 600; } th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: 1rem; }
.columns > div { min-width: 0; }
details { margin: 0.5rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: #f1f3f6; padding: 0.6rem; border-radius: 6px; font-size: 0.82rem; }
img { width: 100%; min-width: 640px; max-width: 1300px; height: auto; display: block; }
.note { color: #5b616b; font-size: 0.88rem; }
@media (max-width: 600px) {
  body { padding: 0.5rem; } section { padding: 0.7rem; }
  table { font-size: 0.8rem; } th, td { padding: 0.15rem 0.35rem; } th { white-space: normal; }
}
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page that needs nothing else: no script, no font, no link. ``parts`` are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A box with a title; ``parts`` are HTML, and without any there is no box."""
    inside = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{inside}</section>" if inside else ""


def note(text: str) -> str:
    """A line in small print."""
    return f'<p class="note">{escape(text)}</p>'


def details(title: str, inside: str, is_open: bool = False) -> str:
    """What opens with a click; ``inside`` is HTML."""
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>\n{inside}</details>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], words: Sequence[int] = (0,)) -> str:
    """A table that can be pushed sideways where it is too wide. ``words``: columns that hold words, not numbers."""

    def row(tag: str, cells: Sequence[Any]) -> str:
        kinds = [" class=text" if column in words else "" for column in range(len(cells))]
        return "".join(f"<{tag}{kind}>{_cell(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    return f'<div class="wide"><table><thead><tr>{row("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))
