"""Findings of a round's reports: which values warn, which block."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from clincot.config import DecideConfig
from clincot.judging.calibration import make_identity_calibration
from clincot.judging.combination import PanelMember, ScoreCombiner
from clincot.promotion.judge_health import check_judge_health, population_stability_index
from clincot.records import Judgement

SECTION = DecideConfig()
PAIRS: dict[str, Any] = {
    "questions": 10,
    "questions_with_pairs": 10,
    "candidates": 40,
    "candidates_unscored": 0,
    "chains_cut": 0,
    "considered": 60,
    "dropped": {},
    "pairs": 20,
    "same_region": 0,
    "written": 0,
    "longer_rejected_auc_before": 0.5,
    "longer_rejected_auc": 0.5,
    "longer_rejected_auc_tokens": 0.5,
    "mean_chosen_chars": 3.0,
    "mean_rejected_chars": 3.0,
    "contradictions": 0,
    "gaps_considered": {},
    "gaps_kept": {},
}


def panel(path: Path, scores: list[tuple[float | None, float | None]]) -> Path:
    """The report of a panel of two that gave these scores, as the judge stage writes it."""
    seats = [PanelMember(name=name, weight=1.0, calibration=make_identity_calibration(name)) for name in ("a", "b")]
    judgements = [
        Judgement(candidate=f"c{n}", judge=judge, prompt="p", score=score, reason="" if score is not None else "down")
        for n, both in enumerate(scores)
        for judge, score in zip(("a", "b"), both, strict=True)
    ]
    combination = ScoreCombiner(seats, quorum=2)
    list(combination.score_candidates(judgements))
    path.write_text(json.dumps(combination.build_report().model_dump(mode="json")))
    return path


def severities(config: DecideConfig = SECTION, **reports: Path | None) -> dict[str, str]:
    given = {"panel": None, "before": None, "pairs": None, **reports}
    return {finding.name: finding.severity for finding in check_judge_health(config, **given)}


AGREED: list[tuple[float | None, float | None]] = [(n / 20, n / 20 + 0.01) for n in range(20)]


def test_judges_that_agree_are_in_order(tmp_path: Path) -> None:
    assert severities(panel=panel(tmp_path / "p.json", AGREED)) == {
        "judges' agreement": "ok",
        "candidates unscored": "ok",
        "judge a": "ok",
        "judge b": "ok",
    }


def test_a_judge_that_says_the_same_to_everything_blocks(tmp_path: Path) -> None:
    found = severities(panel=panel(tmp_path / "p.json", [(n / 20, 0.7) for n in range(20)]))
    assert (found["judge a"], found["judge b"]) == ("ok", "block")
    assert found["judges' agreement"] == "block"  # a constant agrees with nothing


def test_judges_that_contradict_each_other_block(tmp_path: Path) -> None:
    assert (
        severities(panel=panel(tmp_path / "p.json", [(n / 20, 1 - n / 20) for n in range(20)]))["judges' agreement"]
        == "block"
    )


def test_an_outage_half_way_blocks(tmp_path: Path) -> None:
    """Half of the candidates have no panel score."""
    scores = [(a, b if n < 10 else None) for n, (a, b) in enumerate(AGREED)]
    assert severities(panel=panel(tmp_path / "p.json", scores))["candidates unscored"] == "block"


def test_shifted_scores_warn(tmp_path: Path) -> None:
    low = panel(tmp_path / "low.json", [(0.05, 0.06 + n / 1000) for n in range(20)])
    now = panel(tmp_path / "now.json", AGREED)
    assert severities(panel=now, before=low)["score shift"] == "warn"
    assert severities(panel=now, before=now)["score shift"] == "ok"


def test_the_stability_index_by_hand() -> None:
    # 10 in the first bin, then 10 in the second; half a count more in each of ten bins: 10.5/15 and .5/15 change places
    value = population_stability_index({"0.0": 10}, {"0.1": 10})
    assert value == pytest.approx(2 * (10.5 - 0.5) / 15 * math.log(10.5 / 0.5))
    assert population_stability_index({}, {"0.1": 10}) is None


@pytest.mark.parametrize(
    ("changed", "name", "severity"),
    [
        ({}, "length AUC", "ok"),
        ({"longer_rejected_auc": 0.55}, "length AUC", "ok"),
        ({"longer_rejected_auc": 0.56}, "length AUC", "block"),
        ({"longer_rejected_auc": 0.44}, "length AUC", "block"),
        # The pairs were balanced to 0.5 ± 0.2 (pair.length_auc_tolerance), and are judged by the same.
        ({"longer_rejected_auc": 0.7, "length_auc_tolerance": 0.2}, "length AUC", "ok"),
        ({"longer_rejected_auc": 0.71, "length_auc_tolerance": 0.2}, "length AUC", "block"),
        ({"longer_rejected_auc": None, "pairs": 0}, "length AUC", "block"),
        ({"contradictions": 2}, "contradictions", "ok"),
        ({"contradictions": 3}, "contradictions", "warn"),
        ({"contradictions": 11}, "contradictions", "block"),
    ],
)
def test_pairs(changed: dict[str, Any], name: str, severity: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.report.json"
    path.write_text(json.dumps(PAIRS | changed))
    assert severities(pairs=path)[name] == severity
