"""Health checks of a round's judges and preference pairs, from the reports of the judge and pair stages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from clincot.config import DecideConfig
from clincot.jsonl import read_json_model
from clincot.judging.combination import PanelReport
from clincot.preferences.pairs import PairReport
from clincot.records import GateFinding, Outcome

GOOD_ALPHA = 0.667  # smallest agreement that allows tentative conclusions (Krippendorff 2004)
CONSTANT_SD = 1e-4  # below this standard deviation a judge gives the same score to everything
CONTRADICTIONS_WARN, CONTRADICTIONS_BLOCK = 0.1, 0.5  # share of pairs contradicted by a pair of the same question
_BINS = [f"{number / 10:.1f}" for number in range(10)]


def check_judge_health(
    config: DecideConfig, *, panel: Path | None, before: Path | None, pairs: Path | None
) -> list[GateFinding]:
    """Check the reports whose paths are not None; `before` is the panel's report of the previous round.

    Raises InvalidRecord if a file is not such a report.
    """
    findings = []
    if panel is not None:
        report = read_json_model(panel, PanelReport)
        findings += [_check_agreement(report, config), _check_unscored(report, config), *_check_judges(report)]
        if before is not None:
            findings.append(_check_score_shift(report, read_json_model(before, PanelReport), config))
    if pairs is not None:
        pair_report = read_json_model(pairs, PairReport)
        findings += [_check_length_bias(pair_report), _check_contradictions(pair_report)]
    return findings


def check_graders(outcomes: Iterable[Outcome], reports: Iterable[Path | None]) -> list[GateFinding]:
    """Block if a judge that made preference pairs also graded the answers; no finding if no panel graded any.

    reports: the panel reports of this round and of the one before; None if there is none. Raises InvalidRecord.
    """
    graders: set[str] = set()
    for outcome in outcomes:
        graders.update(outcome.graders)
    if not graders:
        return []
    made_pairs: dict[str, str] = {}
    for path in reports:
        if path is not None:
            made_pairs |= {judge.digest: judge.name for judge in read_json_model(path, PanelReport).judges}
    both = sorted(made_pairs[digest] for digest in graders & set(made_pairs))
    reason = f"{len(graders)} judges graded the open answers; none of them made preference pairs."
    if both:
        reason = f"Open answers were graded by {', '.join(both)}, which made the preference pairs too."
    return [
        GateFinding(name="open judges", severity="block" if both else "ok", value=len(both), threshold=0, reason=reason)
    ]


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
    findings = []
    for judge in report.judges:
        if judge.left_out:
            findings.append(
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
            findings.append(
                GateFinding(
                    name=f"judge {judge.name}",
                    severity="block" if constant else "ok",
                    value=round(judge.sd_raw, 6),
                    threshold=CONSTANT_SD,
                    reason=f"Judge {judge.name} gives {'the same score to all' if constant else 'different scores to'} "
                    f"{judge.scored} candidates (standard deviation {judge.sd_raw:.4f}).",
                )
            )
    return findings


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
    """Compute the population stability index Σ (q - p) ln(q / p) of two histograms {bin: count}.

    p and q are the shares of the ten bins before and now; half a count is added to every bin, so that an empty one
    does not make the index infinite. None if a histogram is empty. This is the symmetrised Kullback-Leibler divergence.
    """
    if not before or not now:
        return None
    p = _smoothed_shares(before)
    q = _smoothed_shares(now)
    return sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True))


def _smoothed_shares(counts: Mapping[str, int]) -> list[float]:
    smoothed = [counts.get(name, 0) + 0.5 for name in _BINS]
    total = sum(smoothed)
    return [count / total for count in smoothed]


def _check_length_bias(report: PairReport) -> GateFinding:
    """Check the pairs by the tolerance with which they were made, which their report repeats."""
    auc, allowed = report.longer_rejected_auc, report.length_auc_tolerance
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
