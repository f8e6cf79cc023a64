"""Simulated rounds have the requested statistics, and decide as the gate does."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import gate_simulation
from benchmarks.simulated_rounds import Setting, draw_benchmark, draw_fresh_round, draw_repeated_round
from clincot.config import DecideConfig
from clincot.promotion.gate import build_criteria
from clincot.promotion.verdict import EvidenceSums, run_checks, should_promote


@pytest.mark.parametrize("repeated", [False, True])
def test_simulated_rounds_have_the_requested_statistics(repeated: bool) -> None:
    """The tolerances are several standard errors for 22,000 questions.

    The standard error is about .0034 for the gain and .003 for the discordance.
    """
    setting, rng = Setting(images=4000, gain=0.03, discordance=0.15), np.random.default_rng(0)
    one = (
        draw_repeated_round(draw_benchmark(setting, rng), setting, rng) if repeated else draw_fresh_round(setting, rng)
    )
    d, image = one.gain_N, one.image_N
    assert d.mean() == pytest.approx(0.03, abs=0.012)
    assert np.abs(d).mean() == pytest.approx(0.15, abs=0.012)
    if repeated:
        return
    # intra-cluster correlation: covariance of two questions of the same image, over the variance
    s, m = np.bincount(image, weights=d), np.bincount(image)
    products = (s**2 - np.bincount(image, weights=d**2)).sum() / (m * (m - 1)).sum()
    assert (products - d.mean() ** 2) / d.var() == pytest.approx(0.1, abs=0.03)


def test_a_simulated_pipeline_decides_as_the_gate() -> None:
    config, promoted = DecideConfig(), 0
    for seed in range(12):
        one = draw_fresh_round(Setting(images=300, questions=1000, gain=0.05), np.random.default_rng(seed))
        looks = gate_simulation.PooledLooks()
        looks.add_round(one)
        entry, p = gate_simulation._decide_round([], ("old", "new"), looks)
        gain, rows = one.sum_gains()
        guards, blind = one.draw_other_checks()
        checks = run_checks(EvidenceSums(gain, rows, guards, blind), build_criteria(config), level=entry.budget.level)
        assert entry.promoted == should_promote(checks)
        assert p == checks[0].p
        promoted += entry.promoted
    assert promoted > 6  # a gain of 5 points is 3.7 standard errors; the gate needs about 2.2


def test_confidence_limits_of_extreme_shares() -> None:
    """Clopper-Pearson: for 0 of 100, the upper limit is 1 - .025^(1/100) = .0362."""
    assert gate_simulation._clopper_pearson_limit(0, 100, 0.025) == 0.0
    assert gate_simulation._clopper_pearson_limit(0, 100, 0.975) == pytest.approx(0.0362, abs=1e-4)
    assert gate_simulation._clopper_pearson_limit(100, 100, 0.975) == 1.0
