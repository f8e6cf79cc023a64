"""Were the judges and the pairs of a round in order? Read from the reports that the judge and pair stages write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from clincot.config import DecideConfig
from clincot.jsonl import read_json_model
from clincot.judging.combination import PanelReport
from clincot.preferences.pairs import PairReport
from clincot.records import GateFinding

GOOD_ALPHA = 0.667  # below it agreement is not enough even for tentative conclusions (Krippendorff 2004)
CONSTANT_SD = 1e-4  # standard deviation of a judge that says the same to everything
CONTRADICTIONS_WARN, CONTRADICTIONS_BLOCK = 0.1, 0.5  # share of pairs that another pair of the question contradicts
_BINS = [f"{number / 10:.1f}" for number in range(10)]


def check_judge_health(
    config: DecideConfig, *, panel: Path | None, before: Path | None, pairs: Path | None
) -> list[GateFinding]:
    """Findings of the reports that are given; raises BadRecord on one that is none."""
    found = []
    if panel is not None:
        report = read_json_model(panel, PanelReport)
        found += [_check_agreement(report, config), _check_unscored(report, config), *_check_judges(report)]
        if before is not None:
            found.append(_check_score_shift(report, read_json_model(before, PanelReport), config))
    if pairs is not None:
        made = read_json_model(pairs, PairReport)
        found += [_check_length_bias(made, config), _check_contradictions(made)]
    return found


def _check_agreement(report: PanelReport, config: DecideConfig) -> GateFinding:
    alpha = report.alpha_calibrated
    if alpha.value is None:
        severity: Literal["ok", "warn", "block"] = "warn" if len(report.judges) < 2 else "block"
        return GateFinding(
            name="judges' agreement",
            severity=severity,
            value=None,
            threshold=config.min_alpha,
            reason=f"The judges' agreement is undefined: {alpha.reason}.",
        )
    severity = "block" if alpha.value < config.min_alpha else "warn" if alpha.value < GOOD_ALPHA else "ok"
    return GateFinding(
        name="judges' agreement",
        severity=severity,
        value=round(alpha.value, 6),
        threshold=config.min_alpha,
        reason=f"The judges' agreement (Krippendorff's alpha) is {alpha.value:.3f}; below {config.min_alpha:g} it "
        f"blocks, below {GOOD_ALPHA} it is not enough for tentative conclusions.",
    )


def _check_unscored(report: PanelReport, config: DecideConfig) -> GateFinding:
    share = 1 - report.scored / report.candidates if report.candidates else 1.0
    return GateFinding(
        name="candidates unscored",
        severity="block" if share > config.max_unscored else "ok",
        value=round(share, 6),
        threshold=config.max_unscored,
        reason=f"{share:.1%} of {report.candidates} candidates have no panel score; {config.max_unscored:.1%} are "
        "allowed.",
    )


def _check_judges(report: PanelReport) -> list[GateFinding]:
    found = []
    for judge in report.judges:
        if judge.left_out:
            found.append(
                GateFinding(
                    name=f"judge {judge.name}",
                    severity="warn",
                    value=None,
                    threshold=None,
                    reason=f"Judge {judge.name} was left out: {judge.left_out}.",
                )
            )
        elif judge.sd_raw is not None and judge.scored > 1:
            constant = judge.sd_raw < CONSTANT_SD
            found.append(
                GateFinding(
                    name=f"judge {judge.name}",
                    severity="block" if constant else "ok",
                    value=round(judge.sd_raw, 6),
                    threshold=CONSTANT_SD,
                    reason=f"Judge {judge.name} gives {'the same score to all' if constant else 'different scores to'} "
                    f"{judge.scored} candidates (standard deviation {judge.sd_raw:.4f}).",
                )
            )
    return found


def _check_score_shift(now: PanelReport, before: PanelReport, config: DecideConfig) -> GateFinding:
    value = population_stability_index(before.scores, now.scores)
    if value is None:
        return GateFinding(
            name="score shift",
            severity="warn",
            value=None,
            threshold=config.max_shift,
            reason="Whether the scores shifted cannot be told: a report has no distribution.",
        )
    return GateFinding(
        name="score shift",
        severity="warn" if value > config.max_shift else "ok",
        value=round(value, 6),
        threshold=config.max_shift,
        reason=f"The panel's scores moved by {value:.3f} (population stability index) since the last round; "
        f"above {config.max_shift:g} the judges or the questions are others.",
    )


def population_stability_index(before: Mapping[str, int], now: Mapping[str, int]) -> float | None:
    """Σ (q - p) ln(q / p) over ten bins, each with half a count more so that an empty bin is no infinity."""
    if not before or not now:
        return None
    p, q = ([counts.get(name, 0) + 0.5 for name in _BINS] for counts in (before, now))
    shares = [(a / sum(p), b / sum(q)) for a, b in zip(p, q, strict=True)]
    return sum((b - a) * math.log(b / a) for a, b in shares)


def _check_length_bias(report: PairReport, config: DecideConfig) -> GateFinding:
    auc, allowed = report.longer_rejected_auc, config.length_auc_tolerance
    if auc is None:
        return GateFinding(
            name="length AUC",
            severity="block",
            value=None,
            threshold=allowed,
            reason="There is not one preference pair.",
        )
    outside = abs(auc - 0.5) > allowed + 1e-9
    return GateFinding(
        name="length AUC",
        severity="block" if outside else "ok",
        value=round(auc, 6),
        threshold=allowed,
        reason=f"'The longer answer was rejected' tells the pairs' sides apart with AUC {auc:.3f}; it may be "
        f"0.5 ± {allowed:g}, or length alone can be learnt.",
    )


def _check_contradictions(report: PairReport) -> GateFinding:
    share = report.contradictions / report.pairs if report.pairs else 0.0
    severity: Literal["ok", "warn", "block"] = "ok"
    if share > CONTRADICTIONS_WARN:
        severity = "block" if share > CONTRADICTIONS_BLOCK else "warn"
    return GateFinding(
        name="contradictions",
        severity=severity,
        value=round(share, 6),
        threshold=CONTRADICTIONS_BLOCK,
        reason=f"{report.contradictions} of {report.pairs} pairs have their two answers the other way round in another "
        f"pair of the same question ({share:.1%}); above {CONTRADICTIONS_WARN:.0%} it is said, above "
        f"{CONTRADICTIONS_BLOCK:.0%} it blocks.",
    )
