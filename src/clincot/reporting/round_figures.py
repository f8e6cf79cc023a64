"""A dozen figures of a round, and the data of three plots, in the formats of DVC and of other trackers.

metrics.json          one number or word for each figure: `dvc metrics show`, `dvc exp show`
accuracy.csv          accuracy of the policy before and after the round, with its 95 % interval
reliability.csv       the calibrated probability of each judge against its raw P(yes)
gaps.csv              score gaps of all combinations of candidates, and of the pairs that were kept
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from clincot.evaluation.answer_protocols import AnswerProtocol, choose_headline
from clincot.jsonl import atomic_write, read_json_model, read_records, write_json
from clincot.judging.calibration import Calibration
from clincot.judging.combination import PanelReport
from clincot.preferences.pairs import PairReport
from clincot.records import BenchmarkReport, Decision, Interval

METRICS_FILE, ACCURACY_FILE, RELIABILITY_FILE, GAPS_FILE = (
    "metrics.json",
    "accuracy.csv",
    "reliability.csv",
    "gaps.csv",
)
_CURVE_STEPS = 20  # of a judge's curve from raw to calibrated probability
# Metrics of the benchmark by the name of the figure; one that does not apply to the benchmark is left out.
_BENCHMARK_FIGURES = {
    "accuracy": "accuracy",
    "accuracy_closed": "closed_accuracy",
    "token_f1_open": "token_f1",
    "region_hit_rate": "hit_rate",
    "hallucination": "hallucination",
    "off_format": "off_format",
}
_DECIMALS = 4


@dataclass(frozen=True)
class RoundReports:
    """The reports of a round."""

    before: BenchmarkReport  # of the policy before the round
    after: BenchmarkReport
    decision: Decision
    panel: PanelReport
    pairs: PairReport
    calibrations: tuple[Calibration, ...] = ()
    arm: str = "written"


def read_round_reports(paths: Mapping[str, Path], calibration: Path | None, arm: str) -> RoundReports:
    """Read the reports. paths: by the names of RoundReports. calibration: None for raw probabilities."""
    (decision,) = read_records(paths["decision"], Decision)
    return RoundReports(
        before=read_json_model(paths["before"], BenchmarkReport),
        after=read_json_model(paths["after"], BenchmarkReport),
        decision=decision,
        panel=read_json_model(paths["panel"], PanelReport),
        pairs=read_json_model(paths["pairs"], PairReport),
        calibrations=tuple(read_records(calibration, Calibration)) if calibration else (),
        arm=arm,
    )


def write_round_figures(reports: RoundReports, folder: Path) -> None:
    """Write the metrics and the data of the plots into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / METRICS_FILE, collect_round_metrics(reports))
    _write_table(folder / ACCURACY_FILE, ("round", "accuracy", "low", "high"), list_accuracies(reports))
    _write_table(folder / RELIABILITY_FILE, ("judge", "raw", "calibrated"), list_reliability_points(reports))
    _write_table(folder / GAPS_FILE, ("gap", "considered", "kept"), list_gap_counts(reports.pairs))


def collect_round_metrics(reports: RoundReports) -> dict[str, float | int | str]:
    """The figures of a round by name; one that was not measured is left out."""
    measured = reports.after.metrics.get(reports.arm, {})
    gain, found = reports.decision.difference, {}
    headline = _find_headline(reports)
    if headline != "accuracy" and headline in measured:
        found[headline] = measured[headline].value
    for name, metric in _BENCHMARK_FIGURES.items():
        found[name] = measured[metric].value if metric in measured else None
    found |= {
        "gain": gain.value,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "judges_agreement": reports.panel.alpha_calibrated.value,
    }
    figures: dict[str, float | int | str] = {
        name: round(value, _DECIMALS) for name, value in found.items() if value is not None
    }
    return {**figures, "pairs": reports.pairs.pairs, "verdict": reports.decision.verdict}


def _find_headline(reports: RoundReports) -> str:
    """The metric of accuracy by the protocol on which the decision rests."""
    protocol = reports.decision.settings.get("protocol", "strict")
    measured = reports.after.metrics.get(reports.arm, {})
    return choose_headline(protocol, measured) if protocol in get_args(AnswerProtocol) else "accuracy"


def list_accuracies(reports: RoundReports) -> list[tuple[Any, ...]]:
    """Rows (round, accuracy, low, high): round 0 is the policy before the round. An unknown number is an empty cell.

    The accuracy is by the protocol of the decision.
    """
    headline = _find_headline(reports)
    sides: list[Interval | None] = [
        report.metrics.get(reports.arm, {}).get(headline) for report in (reports.before, reports.after)
    ]
    return [(number, side.value, side.low, side.high) for number, side in enumerate(sides) if side is not None]


def list_reliability_points(reports: RoundReports) -> list[tuple[Any, ...]]:
    """Rows (judge, raw, calibrated) along the curve of every judge; a judge without a calibration has the diagonal."""
    names = {judge.digest: judge.name for judge in reports.panel.judges if judge.digest}
    curves = {calibration.judge: calibration for calibration in reports.calibrations}
    rows: list[tuple[Any, ...]] = []
    for digest, name in names.items():
        for step in range(_CURVE_STEPS + 1):
            raw = step / _CURVE_STEPS
            value = curves[digest].calibrate_score(raw) if digest in curves else raw
            rows.append((name, raw, round(value, _DECIMALS)))
    return rows


def list_gap_counts(report: PairReport) -> list[tuple[Any, ...]]:
    """Rows (lower edge of a bin 0.1 wide, combinations considered, pairs kept)."""
    edges = sorted({*report.gaps_considered, *report.gaps_kept}, key=float)
    return [(edge, report.gaps_considered.get(edge, 0), report.gaps_kept.get(edge, 0)) for edge in edges]


def _write_table(path: Path, head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)
