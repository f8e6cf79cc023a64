"""A picture of the learning results: accuracy after each round, one panel for each kind of region, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

PANELS = {"served": "as served", "windows": "likeliest window", "oracle": "oracle region", "whole": "whole image"}
SERIES = {"margin-DPO": "#1b6ca8", "plain DPO": "#d1822c", "SFT on chosen": "#4c9a4c"}
PANEL_W, PANEL_H, LEFT, TOP, GAP, BOTTOM = 190, 220, 44, 58, 14, 34  # pixels
LOW, HIGH = 0.3, 0.9  # range of the accuracy axis


def render_results_chart(rows: Sequence[Mapping[str, Any]], rounds: int) -> str:
    """Render the rows of learning_results.collect_report as an SVG file of fixed size.

    Every series starts at the base policy. Bars are the rows' 95 % intervals; the series stand a little apart, so that
    their bars do not cover each other.
    """
    by_name = {row["row"]: row for row in rows}
    width = LEFT + len(PANELS) * (PANEL_W + GAP)
    height = TOP + PANEL_H + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *_draw_legend(),
    ]
    for number, (arm, title) in enumerate(PANELS.items()):
        x0 = LEFT + number * (PANEL_W + GAP)
        parts += _draw_axes(x0, title, rounds, with_labels=number == 0)
        for position, (series, colour) in enumerate(SERIES.items()):
            steps = [by_name["base"], *(by_name[f"{series}, round {n}"] for n in range(1, rounds + 1))]
            parts += _draw_series([step["accuracy"][arm] for step in steps], x0, 6 * (position - 1), colour)
    return "\n".join([*parts, "</svg>", ""])


def _draw_legend() -> list[str]:
    parts = []
    for number, (series, colour) in enumerate(SERIES.items()):
        x = LEFT + 130 * number
        parts += [
            f'<circle cx="{x + 5}" cy="16" r="4" fill="{colour}"/>',
            f'<text x="{x + 14}" y="20">{escape(series)}</text>',
        ]
    return parts


def _draw_axes(x0: int, title: str, rounds: int, *, with_labels: bool) -> list[str]:
    parts = [f'<text x="{x0}" y="{TOP - 12}" font-weight="bold">{escape(title)}</text>']
    for tenth in range(round(LOW * 10), round(HIGH * 10) + 1):
        y = _scale_accuracy(tenth / 10)
        parts.append(f'<line x1="{x0}" x2="{x0 + PANEL_W}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        if with_labels:
            parts.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">.{tenth}</text>')
    for step in range(rounds + 1):
        label = "base" if step == 0 else f"round {step}"
        x = _place_step(x0, step, rounds)
        parts.append(f'<text x="{x:.1f}" y="{TOP + PANEL_H + 20}" text-anchor="middle">{label}</text>')
    return parts


def _draw_series(intervals: Sequence[Mapping[str, Any]], x0: int, shift: int, colour: str) -> list[str]:
    points = [
        (_place_step(x0, step, len(intervals) - 1) + shift, interval)
        for step, interval in enumerate(intervals)
        if interval["value"] is not None
    ]
    line = " ".join(f"{x:.1f},{_scale_accuracy(interval['value']):.1f}" for x, interval in points)
    parts = [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>']
    for x, interval in points:
        if interval["low"] is not None:
            low, high = _scale_accuracy(interval["low"]), _scale_accuracy(interval["high"])
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{_scale_accuracy(interval["value"]):.1f}" r="3.5" fill="{colour}"/>')
    return parts


def _place_step(x0: int, step: int, rounds: int) -> float:
    margin = 26
    return x0 + margin + step * (PANEL_W - 2 * margin) / max(1, rounds)


def _scale_accuracy(value: float) -> float:
    """The height of an accuracy in pixels; values outside the axis lie on its end."""
    share = (min(max(value, LOW), HIGH) - LOW) / (HIGH - LOW)
    return TOP + PANEL_H * (1 - share)
