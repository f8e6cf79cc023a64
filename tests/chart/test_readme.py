"""The README's table is up to date, and every value is described."""

from __future__ import annotations

from tests.chart.readme import README, readme, rows


def test_the_table_is_up_to_date() -> None:
    assert README.read_text(encoding="utf-8") == readme(), "python -m tests.chart.readme --write"


def test_every_value_is_described() -> None:
    """rows() raises for a value without a description, and names its line."""
    described = {row.key for row in rows()}
    assert {"store.endpoint", "store.existingSecret", "judges", "pipeline.data", "server.first.enabled"} <= described
