"""Markdown tables and intervals, as every report prints them."""

from __future__ import annotations

import pytest

from clincot.records import Interval
from clincot.text import format_interval, markdown_table

ROWS = [["a|b", "1"], ["two\nlines", ""]]


def test_a_compact_table_escapes_pipes_and_line_breaks() -> None:
    assert markdown_table(["name", ""], ROWS) == "| name | |\n|---|---|\n| a\\|b | 1 |\n| two lines |  |"


def test_a_spaced_table_has_a_spaced_rule() -> None:
    assert markdown_table(["name", "n"], ROWS[:1], layout="spaced") == "| name | n |\n| --- | --- |\n| a\\|b | 1 |"


def test_an_aligned_table_pads_its_columns() -> None:
    assert markdown_table(["name", "n"], ROWS, layout="aligned").splitlines() == [
        "| name      | n |",
        "|-----------|---|",
        "| a\\|b      | 1 |",
        "| two lines |   |",
    ]


@pytest.mark.parametrize(
    ("interval", "options", "expected"),
    [
        (Interval(value=0.5, low=0.25, high=0.75, n=4, clusters=2), {}, "0.500 [0.250, 0.750]"),
        (Interval(value=0.5, low=-0.25, high=0.75, n=4, clusters=2), {"signed": True}, "+0.500 [-0.250, +0.750]"),
        (Interval(value=0.5, n=1, clusters=1), {"decimals": 1}, "0.5"),
        (Interval(value=None, n=0), {}, "–"),
        (None, {"missing": "none"}, "none"),
    ],
)
def test_an_interval_is_printed_with_its_limits(
    interval: Interval | None, options: dict[str, object], expected: str
) -> None:
    assert format_interval(interval, **options) == expected  # type: ignore[arg-type]
