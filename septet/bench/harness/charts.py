"""Charts as inline SVG: grouped bars with intervals, and lines. Used by `report.py`; knows numbers and names only.

Colours are CSS classes (`s0` .. `s7`), so that the page's light and dark styles apply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

__all__ = ["COLOURS", "Bar", "Dot", "bars", "legend", "lines"]

COLOURS = 8
WIDTH, LABEL, VALUE = 720, 190, 90
ROW, GAP, TOP = 20, 14, 8


@dataclass(frozen=True, slots=True)
class Bar:
    group: str
    series: int
    name: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Dot:
    x: float
    y: float
    text: str
    low: float | None = None
    high: float | None = None


def legend(names: list[str]) -> str:
    keys = (f'<span><i class="k s{i % COLOURS}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<p class="legend">{"".join(keys)}</p>'


def bars(rows: list[Bar], label: str) -> str:
    """Horizontal, those of a group under its name."""
    top = max([max(b.value, b.high or 0.0) for b in rows] or [1.0]) or 1.0
    room = WIDTH - LABEL - VALUE
    parts, y, group = [], TOP, None
    for b in rows:
        if b.group != group:
            y += GAP if group is not None else 0
            group = b.group
            parts.append(_text(LABEL - 8, y + 14, b.group, "end"))
        width = max(1.0, b.value / top * room)
        said = escape(f"{b.group}, {b.name}: {b.text}")
        parts.append(
            f'<rect class="s{b.series % COLOURS}" x="{LABEL}" y="{y + 2}" width="{width:.1f}" height="{ROW - 4}" '
            'rx="3">'
            f"<title>{said}</title></rect>"
        )
        end = width
        if b.low is not None and b.high is not None:
            low, high = LABEL + b.low / top * room, LABEL + b.high / top * room
            parts.append(f'<path class="ci" d="M{low:.1f} {y + ROW / 2}H{high:.1f}"/>')
            end = max(width, high - LABEL)
        parts.append(_text(LABEL + end + 6, y + 14, b.text.partition(" (")[0], "start", "v"))
        y += ROW
    return _svg(WIDTH, y + TOP, label, parts)


def lines(series: dict[str, list[Dot]], label: str, x_name: str, y_name: str, *, log_x: bool = False) -> str:
    """One line a series, in the order of its dots; both axes begin at 0 unless x is drawn as powers of two."""
    left, right, top, bottom, height = 70, 24, 28, 44, 330
    every = [dot for dots in series.values() for dot in dots]
    x_top, y_top = max([d.x for d in every] or [1.0]) or 1.0, max([d.high or d.y for d in every] or [1.0]) or 1.0
    x_marks = sorted({d.x for d in every}) if log_x else _ticks(x_top)
    y_marks = _ticks(y_top)
    x_top, y_top = x_top if log_x else max(x_top, x_marks[-1]), max(y_top, y_marks[-1])
    spread = math.log2(x_top) or 1.0

    def at_x(x: float) -> float:
        share = math.log2(max(x, 1.0)) / spread if log_x else x / x_top
        return left + share * (WIDTH - left - right)

    def at_y(y: float) -> float:
        return height - bottom - y / y_top * (height - top - bottom)

    parts = []
    for mark in y_marks:
        parts.append(f'<path class="grid" d="M{left} {at_y(mark):.1f}H{WIDTH - right}"/>')
        parts.append(_text(left - 8, at_y(mark) + 4, f"{mark:,g}", "end"))
    parts += [_text(at_x(mark), height - bottom + 18, f"{mark:,g}", "middle") for mark in x_marks]
    parts.append(_text((left + WIDTH - right) / 2, height - 6, x_name, "middle"))
    parts.append(_text(4, 10, y_name, "start"))
    for number, (name, dots) in enumerate(series.items()):
        kind = f"s{number % COLOURS}"
        if len(dots) > 1:
            path = " L".join(f"{at_x(d.x):.1f} {at_y(d.y):.1f}" for d in dots)
            parts.append(f'<path class="line {kind}" d="M{path}"/>')
        for d in dots:
            if d.low is not None and d.high is not None:
                parts.append(f'<path class="ci" d="M{at_x(d.x):.1f} {at_y(d.low):.1f}V{at_y(d.high):.1f}"/>')
            said = f"<title>{escape(f'{name}: {d.text}')}</title>"
            parts.append(f'<circle class="{kind}" cx="{at_x(d.x):.1f}" cy="{at_y(d.y):.1f}" r="4.5">{said}</circle>')
    return _svg(WIDTH, height, label, parts)


def _ticks(top: float) -> list[float]:
    """Round marks from 0 to at least `top`."""
    step = 10 ** math.floor(math.log10(top / 4))
    step = next(step * m for m in (1, 2, 2.5, 5, 10) if step * m * 4 >= top * 0.999)
    return [round(step * i, 10) for i in range(math.ceil(top / step - 1e-9) + 1)]


def _text(x: float, y: float, words: str, anchor: str, kind: str = "t") -> str:
    words = words if len(words) < 34 else words[:32] + "…"
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(width: float, height: float, label: str, parts: list[str]) -> str:
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}">'
    return head + "".join(parts) + "</svg>"
