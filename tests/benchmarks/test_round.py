"""The round's benchmark compares ways that write the same records."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.round import BATCH_SIZES, STAGES, measure_round, render_round


@pytest.mark.slow
def test_every_way_writes_the_same_records(tmp_path: Path) -> None:
    figures = measure_round(tmp_path, tmp_path / "data", 1)
    assert list(figures["ways"]) == list(BATCH_SIZES)
    for way in figures["ways"].values():
        assert way["equal_regions"] == 1
        assert way["equal_answers"] == 1
        assert way["largest_difference"] < 1e-4
        assert way["total"] == pytest.approx(sum(way[stage] for stage in STAGES), abs=0.02)  # each rounded to .01 s
    assert figures["candidates"] > figures["regions"] > 1  # several answers from a region
    assert render_round(figures).count("\n") >= 4
