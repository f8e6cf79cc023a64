"""The figures of benchmarks/scaling.py, and one run at a tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scaling import STEPS, find_faults, fit_exponent, prepare_material, render_scaling


def test_exponent_is_the_slope_between_the_two_largest_sizes() -> None:
    """Ten times the questions in ten times the seconds: 1; in a hundred times: 2. The first size does not count."""
    assert fit_exponent([1_000, 10_000, 100_000], [9.0, 1.0, 10.0]) == pytest.approx(1.0)
    assert fit_exponent([10_000, 100_000], [1.0, 100.0]) == pytest.approx(2.0)


def test_a_quadratic_step_and_a_slow_decision_are_faults() -> None:
    steps = {name: {"seconds": [1.0, 10.0], "peak_mb": [100.0, 200.0]} for name in STEPS}
    figures = {"sizes": [10_000, 100_000], "steps": steps, "exponents": dict.fromkeys(STEPS, 1.0)}
    assert find_faults(figures) == []
    figures["exponents"] = {**dict.fromkeys(STEPS, 1.0), "pair": 2.0}
    steps["decide"] = {"seconds": [20.0, 200.0], "peak_mb": [100.0, 200.0]}
    assert find_faults(figures) == [
        "pair grows with exponent 2.0, allowed are 1.1",
        "decide takes 200.0 s and 200.0 MB",
    ]
    assert "| pair | 1.00 s, 100 MB | 10.00 s, 200 MB | 2.00 |" in render_scaling(figures)


def test_every_step_runs(tmp_path: Path) -> None:
    prepare_material(tmp_path, 40)
    for run in STEPS.values():
        run(tmp_path)
    assert (tmp_path / "decision.json").is_file()
