"""The table of results: one row a policy, one column an arm of the benchmark, and a row for the blind baseline.

`clincot rounds`, `clincot demo`, `clincot compare` and the benchmarks of this repository print it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clincot.records import Interval
from clincot.text import format_interval, markdown_table

ARM_LABELS = {
    "served": "as served",
    "written": "own region",
    "windows": "grounder",
    "http": "grounder (http)",
    "random": "random region",
    "wrong": "wrong region",
    "oracle": "oracle region",
    "shuffled": "other patient",
    "whole": "whole image",
}
MISSING = "missing"


@dataclass(frozen=True)
class ResultsRow:
    """A policy's cells: the metric of each arm, and the further columns."""

    name: str
    arms: Mapping[str, Interval | None]
    further: Sequence[str] = ()
    missing: bool = False  # it was not measured; its cells say so


@dataclass(frozen=True)
class ResultsTable:
    """What the table shows. `further` names the columns after the arms."""

    label: str  # of the metric, such as "accuracy"
    arms: Sequence[str]
    rows: Sequence[ResultsRow]
    blind: Interval | None
    further: Sequence[str] = field(default_factory=tuple)


def render_table(table: ResultsTable) -> str:
    """Render it as Markdown; a value that does not exist is a dash."""
    head = ["policy", *(f"{table.label}: {ARM_LABELS.get(arm, arm)}" for arm in table.arms), *table.further]
    rows = []
    for row in table.rows:
        if row.missing:
            rows.append([row.name, *[MISSING] * (len(head) - 1)])
        else:
            rows.append([row.name, *(format_interval(row.arms.get(arm)) for arm in table.arms), *row.further])
    blind = ["blind (no image)", format_interval(table.blind), *["–"] * (len(head) - 2)]
    return markdown_table(head, [*rows, blind])


def read_interval(stored: Mapping[str, Any] | None) -> Interval | None:
    """An interval as results.json and report.json hold it."""
    return None if stored is None else Interval.model_validate(stored)
