"""Scores of generated reports against reference reports, from two files: `clincot report-metrics`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clincot.datasets.reports import ReportRow, read_reports
from clincot.evaluation.intervals import MIN_RELIABLE_CLUSTERS, MetricSums
from clincot.evaluation.report_text.report_scorer import REPORT_METRIC_HEADINGS, build_report_metrics
from clincot.jsonl import InvalidRecord, read_records, write_json
from clincot.records import Interval, Study

NOT_CLINICAL_NOTE = "Agreement of texts is not agreement about the patient; none of these numbers is clinical evidence."


@dataclass(frozen=True)
class ReportScores:
    """Metrics with their intervals, what computed them, and what is absent and why."""

    label: str
    metrics: dict[str, Interval]
    by: dict[str, str]
    absent: dict[str, str]
    clusters: str  # what the bootstrap draws: "patients" or "studies"
    views: dict[int, int]  # {views that a report was generated from: reports}; 0: not said

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "metrics": {n: m.model_dump() for n, m in self.metrics.items()},
            "note": NOT_CLINICAL_NOTE,
        }

    def render_table(self) -> str:
        """Markdown: a metric a row; below it what computed the metrics and what is absent."""
        rows = [f"{self.label}", "", "| metric | value [95 % interval] | reports |", "|---|---|---|"]
        rows += [
            f"| {REPORT_METRIC_HEADINGS[name]} | {_format_value(self.metrics[name])} | {_format_counts(self.metrics[name])} |"
            for name in REPORT_METRIC_HEADINGS
            if name in self.metrics
        ]
        drawn = max((metric.clusters for metric in self.metrics.values()), default=0)
        rows += [
            "",
            f"95 % intervals from a bootstrap of {drawn} {self.clusters}; of BLEU and the finding metrics the "
            "counts are drawn and the corpus score is computed again.",
        ]
        if drawn < MIN_RELIABLE_CLUSTERS:
            rows[-1] += f" Below {MIN_RELIABLE_CLUSTERS} they are approximate."
        rows += [f"- {name}: {by}" for name, by in self.by.items()]
        if "r2gen" in self.by and set(self.views) != {2}:
            said = ", ".join(f"{n} from {views or 'an unknown number of'} views" for views, n in self.views.items())
            rows.append(f"- r2gen is the protocol of the texts alone: R2Gen's models see 2 views ({said})")
        rows += [f"- absent: {name}: {reason}" for name, reason in self.absent.items()]
        return "\n".join([*rows, NOT_CLINICAL_NOTE])


def score_reports(
    references: Path,
    generated: Path,
    *,
    training: Path | None = None,
    studies: Path | None = None,
    clinical: Sequence[str] = (),
    label: str = "",
    seed: int = 0,
    resamples: int = 2000,
) -> ReportScores:
    """Score the generated reports (reports.jsonl) study by study.

    training: the training reports, for the r2gen protocol. studies: a studies.jsonl that names the patients, by whom
    the bootstrap is then clustered. A reference without a generated report is unscored in every metric, and
    counted. Raises BadRecord on a generated report of a study without a reference, an empty reference, or an unknown
    study.
    """
    texts = {row.study: row for row in tqdm(read_reports(generated), desc="generated", unit=" reports", disable=None)}
    patients = {} if studies is None else {s.id: s.patient or s.id for s in read_records(studies, Study)}
    metrics = build_report_metrics(
        None if training is None else (row.text for row in read_reports(training)), clinical=clinical
    )
    sums: MetricSums = {}
    views: dict[int, int] = {}
    for row in _require_text(tqdm(read_reports(references), desc="scored", unit=" reports", disable=None), references):
        if studies is not None and row.study not in patients:
            raise InvalidRecord(
                f"{references}: study {row.study!r} is not in {studies}; give the studies of these reports"
            )
        found = texts.pop(row.study, None)
        metrics.add_report(sums, None if found is None else found.text, row.text, patients.get(row.study, row.study))
        if found is not None:
            views[found.views] = views.get(found.views, 0) + 1
    if texts:
        raise InvalidRecord(
            f"{generated}: {len(texts)} reports are of studies without a reference in {references}, "
            f"for instance {next(iter(texts))!r}"
        )
    if not sums:
        raise InvalidRecord(f"{references}: there is no report to score against")
    return ReportScores(
        label=label or f"report-text metrics on {references}",
        metrics={name: metric.compute_interval(seed=seed, resamples=resamples) for name, metric in sums.items()},
        by=metrics.by,
        absent=metrics.absent,
        clusters="studies" if studies is None else "patients",
        views=dict(sorted(views.items())),
    )


def write_scores(path: Path, scores: ReportScores) -> None:
    write_json(path, scores.as_json())


def _require_text(rows: Iterable[ReportRow], path: Path) -> Iterable[ReportRow]:
    for row in rows:
        if not row.text.strip():
            raise InvalidRecord(f"{path}: the reference report of study {row.study!r} is empty; leave the study out")
        yield row


def _format_value(metric: Interval) -> str:
    if metric.value is None:
        return "–"
    if metric.low is None or metric.high is None:
        return f"{metric.value:.4f}"
    return f"{metric.value:.4f} [{metric.low:.4f}, {metric.high:.4f}]"


def _format_counts(metric: Interval) -> str:
    return f"{metric.n}" + (f", {metric.n_unscored} unscored" if metric.n_unscored else "")
