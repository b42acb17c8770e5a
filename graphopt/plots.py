"""Figures as SVG within HTML, and pages of them: self-contained, nothing is loaded.

Names come from models, and are escaped. Values that are infinite or no numbers are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from graphopt import atomic

__all__ = ["bars", "curves", "histogram", "page", "table", "write"]

_COLOURS = ("#2f6db3", "#c4622d", "#3d8a57", "#8a5aa8", "#a8862b", "#557a8c")
_MARK = "#c4622d"
_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 40
_ROW = 18  # height of a bar and what is around it
_LABELS = 260  # width of the names beside bars
_LETTERS = 40  # of a name; the whole one is in its tooltip
_TICKS = 5
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem 1.2rem .15rem 0; border-bottom: 1px solid #ddd; }
svg { max-width: 100%; height: auto; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; }
figcaption { font-size: .85rem; color: #444; overflow-wrap: anywhere; max-width: 35rem; }
"""

Points = Sequence[tuple[float, float]]


def curves(series: Mapping[str, Points], *, x: str, y: str, limit: float | None = None) -> str:
    """Lines through points (x, y), by name; `limit` is drawn as a line across."""
    known = {name: _finite(points) for name, points in series.items()}
    every = [point for points in known.values() for point in points]
    if not every:
        return _nothing()
    tall = [] if limit is None else [limit]
    frame = _Frame(
        _span([p[0] for p in every]), _span([0.0, *tall, *(p[1] for p in every)]), (x, y)
    )
    parts = [*frame.axes()]
    if limit is not None:
        parts.append(frame.across(limit, f"limit {limit:.3g}"))
    for index, (name, points) in enumerate(known.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for a, b in points:
            hint = f"{name}: {a:.4g}, {b:.4g}"
            place = f'cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}"'
            parts.append(f'<circle {place} r="2.5" fill="{colour}">{_title(hint)}</circle>')
    if 1 < len(known) <= len(_COLOURS):
        parts += _legend(list(known))
    return _svg(_WIDTH, _HEIGHT, parts)


def bars(rows: Iterable[tuple[str, float]], *, unit: str = "") -> str:
    """Values beside their names, one bar each, in the order given."""
    known = [(name, value) for name, value in rows if math.isfinite(value)]
    if not known:
        return _nothing()
    low, high = min(0.0, *(v for _, v in known)), max(0.0, *(v for _, v in known))
    scale = (_WIDTH - _LEFT) / ((high - low) or 1.0)
    parts: list[str] = []
    for index, (name, value) in enumerate(known):
        top = index * _ROW
        short = name if len(name) <= _LETTERS else "…" + name[1 - _LETTERS :]
        text = f"{value:.4g} {unit}".strip()
        start = _LABELS + (min(value, 0.0) - low) * scale
        size = max(abs(value) * scale, 1.0)
        parts.append(
            f"<g>{_title(f'{name}: {text}')}"
            f'<text x="{_LABELS - 8}" y="{top + 13}" text-anchor="end">{escape(short)}</text>'
            f'<rect x="{start:.1f}" y="{top + 3}" width="{size:.1f}" height="{_ROW - 5}" '
            f'fill="{_COLOURS[0]}"/>'
            f'<text x="{start + size + 5:.1f}" y="{top + 13}">{escape(text)}</text></g>'
        )
    return _svg(_LABELS + _WIDTH + _LEFT, len(known) * _ROW + 4, parts)


def histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    *,
    marks: Mapping[str, float] | None = None,
    x: str = "value",
) -> str:
    """How often values fall between edges, one more than counts, on a logarithmic scale.

    `marks` are places by name, each a line: the ends of a range, say.
    """
    filled = [index for index, count in enumerate(counts) if count > 0]
    if not filled:
        return _nothing()
    heights = [math.log10(1 + count) for count in counts]
    places = [value for value in (marks or {}).values() if math.isfinite(value)]
    ends = [edges[filled[0]], edges[filled[-1] + 1], *places]
    frame = _Frame(_span(ends), _span([0.0, max(heights)]), (x, "log10(1 + count)"))
    parts = [*frame.axes()]
    floor = frame.y(0.0)
    for index in filled:
        left, right = frame.x(edges[index]), frame.x(edges[index + 1])
        top = frame.y(heights[index])
        size = f'width="{max(right - left, 0.5):.2f}" height="{floor - top:.1f}"'
        parts.append(f'<rect x="{left:.2f}" y="{top:.1f}" {size} fill="{_COLOURS[0]}"/>')
    for name, value in (marks or {}).items():
        if math.isfinite(value):
            parts.append(frame.down(value, f"{name} {value:.4g}"))
    return _svg(_WIDTH, _HEIGHT, parts)


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of text as HTML."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def page(title: str, sections: Iterable[tuple[str, Iterable[tuple[str, str]]]]) -> str:
    """A page of figures: sections are a title and (caption, figure or table) pairs."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for name, figures in sections:
        parts.append(f"<section><h2>{escape(name)}</h2>")
        for caption, figure in figures:
            parts.append(f"<figure>{figure}<figcaption>{escape(caption)}</figcaption></figure>")
        parts.append("</section>")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def write(path: Path, text: str) -> None:
    """Write a page or a figure, whole or not at all. InputError for a place that cannot be."""
    atomic.write(path, lambda out: out.write(text.encode("utf-8")))


class _Frame:
    """Axes around the data: from values to places in the picture."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], names: tuple[str, str]
    ) -> None:
        self._x, self._y, self._names = x, y, names

    def x(self, value: float) -> float:
        """From the left."""
        low, high = self._x
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """From the top."""
        low, high = self._y
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> Iterator[str]:
        """Lines, numbers, and what they are of."""
        floor = _HEIGHT - _BOTTOM
        for value in _ticks(*self._y):
            at = self.y(value)
            yield f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" stroke="#e4e4e4"/>'
            yield f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        for value in _ticks(*self._x):
            at = self.x(value)
            yield f'<path d="M{at:.1f} {floor}v4" stroke="#888"/>'
            yield f'<text x="{at:.1f}" y="{floor + 16}" text-anchor="middle">{value:.4g}</text>'
        yield f'<path d="M{_LEFT} {floor}H{_WIDTH - _RIGHT}" stroke="#888"/>'
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        name, side = (escape(text) for text in self._names)
        yield f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{name}</text>'
        place = f'transform="translate(12 {(_TOP + floor) / 2}) rotate(-90)"'
        yield f'<text {place} text-anchor="middle">{side}</text>'

    def across(self, value: float, text: str) -> str:
        """A line at a height."""
        path = f"M{_LEFT} {self.y(value):.1f}H{_WIDTH - _RIGHT}"
        return _dashed(path, text)

    def down(self, value: float, text: str) -> str:
        """A line at a place, named beside it."""
        at = self.x(value)
        anchor, shift = ("end", -4) if at > _WIDTH / 2 else ("start", 4)
        place = f'x="{at + shift:.1f}" y="{_TOP + 10}" text-anchor="{anchor}"'
        line = _dashed(f"M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}", text)
        return f"{line}<text {place}>{escape(text)}</text>"


def _dashed(path: str, text: str) -> str:
    stroke = f'stroke="{_MARK}" stroke-width="1.5" stroke-dasharray="5 3"'
    return f'<path d="{path}" fill="none" {stroke}>{_title(text)}</path>'


def _legend(names: Sequence[str]) -> Iterator[str]:
    for index, name in enumerate(names):
        top = _TOP + 4 + 16 * index
        place = f'x="{_WIDTH - _RIGHT - 20}" y="{top + 9}" text-anchor="end"'
        yield f"<text {place}>{escape(name[:_LETTERS])}</text>"
        square = f'x="{_WIDTH - _RIGHT - 14}" y="{top}" width="10" height="10"'
        yield f'<rect {square} fill="{_COLOURS[index]}"/>'


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> Iterator[float]:
    """Round numbers between two, about five."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    index = math.ceil(low / step)
    while index * step <= high + 1e-9 * step:
        yield index * step
        index += 1


def _svg(width: int, height: int, parts: Iterable[str]) -> str:
    head = f'<svg viewBox="0 0 {width} {height}"'
    style = 'font-family="system-ui, sans-serif" font-size="11" fill="#222"'
    return f'{head} width="{width}" height="{height}" role="img" {style}>{"".join(parts)}</svg>'


def _nothing() -> str:
    return "<p>nothing to show</p>"


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"
