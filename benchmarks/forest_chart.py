"""A forest plot: differences with their intervals, a row each, in groups, around a line at zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from xml.sax.saxutils import escape

from clincot.records import Interval

LABEL_W, PLOT_W, VALUE_W, ROW_H, HEAD, PAD = 290, 360, 150, 20, 44, 12  # pixels


@dataclass(frozen=True)
class ForestRow:
    """One difference; rows of the same group stand together."""

    group: str
    name: str
    difference: Interval


def render_forest_chart(rows: Sequence[ForestRow], title: str) -> str:
    """Render rows as an SVG file. The axis reaches as far as the widest interval, to both sides."""
    reach = max((abs(edge) for row in rows for edge in _list_edges(row.difference)), default=0.1)
    reach = max(0.05, -(-reach // 0.05) * 0.05)  # up to the next twentieth
    groups = [(group, list(members)) for group, members in groupby(rows, key=lambda row: row.group)]
    height = HEAD + ROW_H * (len(rows) + len(groups)) + PAD
    width = LABEL_W + PLOT_W + VALUE_W
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{LABEL_W}" y="16" font-weight="bold">{escape(title)}</text>',
    ]
    for step in range(-2, 3):
        value = reach * step / 2
        x = _scale(value, reach)
        colour = "#888" if step == 0 else "#ddd"
        parts += [
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD - 6}" y2="{height - PAD}" stroke="{colour}"/>',
            f'<text x="{x:.1f}" y="{HEAD - 12}" text-anchor="middle">{value:+.3g}</text>',
        ]
    y = HEAD
    for group, members in groups:
        parts.append(f'<text x="{PAD}" y="{y + 14}" font-weight="bold">{escape(group)}</text>')
        y += ROW_H
        for row in members:
            parts += _draw_row(row, y, reach)
            y += ROW_H
    return "\n".join([*parts, "</svg>", ""])


def _draw_row(row: ForestRow, y: int, reach: float) -> list[str]:
    value, low, high = row.difference.value, row.difference.low, row.difference.high
    parts = [f'<text x="{PAD * 2}" y="{y + 14}">{escape(row.name)}</text>']
    if value is None:
        return parts
    middle = y + ROW_H // 2
    text = f"{value:+.3f}"
    if low is not None and high is not None:
        text += f" [{low:+.3f}, {high:+.3f}]"
        parts.append(
            f'<line x1="{_scale(low, reach):.1f}" x2="{_scale(high, reach):.1f}" y1="{middle}" y2="{middle}" '
            'stroke="#1b6ca8" stroke-width="1.5"/>'
        )
    parts += [
        f'<circle cx="{_scale(value, reach):.1f}" cy="{middle}" r="3.5" fill="#1b6ca8"/>',
        f'<text x="{LABEL_W + PLOT_W + 8}" y="{y + 14}">{text}</text>',
    ]
    return parts


def _list_edges(interval: Interval) -> list[float]:
    return [edge for edge in (interval.value, interval.low, interval.high) if edge is not None]


def _scale(value: float, reach: float) -> float:
    """The horizontal place of a value in pixels."""
    inner = PLOT_W - 40
    return LABEL_W + 20 + inner * (value + reach) / (2 * reach)
