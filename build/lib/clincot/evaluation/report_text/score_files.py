"""Scores of a file of generated reports against a file of reference reports (`clincot report-metrics`)."""

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
from clincot.text import format_interval, markdown_table

NOT_CLINICAL_NOTE = "Agreement of texts is not agreement about the patient; none of these numbers is clinical evidence."


@dataclass(frozen=True)
class ReportScores:
    """Metrics with their intervals, what computed them, and which metrics are absent and why."""

    label: str
    metrics: dict[str, Interval]
    by: dict[str, str]  # {metric: the package that computed it}
    absent: dict[str, str]  # {metric: why it is absent}
    clusters: str  # what the bootstrap draws: "patients" or "studies"
    views: dict[int, int]  # {number of views that a report was generated from, 0 if unknown: number of reports}

    def as_json(self) -> dict[str, Any]:
        """Return the scores as the content of the JSON file."""
        return {
            **asdict(self),
            "metrics": {n: m.model_dump() for n, m in self.metrics.items()},
            "note": NOT_CLINICAL_NOTE,
        }

    def render_table(self) -> str:
        """Render a Markdown table with one row for each metric, and below it what computed the metrics."""
        rows = []
        for name, heading in REPORT_METRIC_HEADINGS.items():
            if name in self.metrics:
                metric = self.metrics[name]
                rows.append([heading, format_interval(metric, decimals=4), _format_counts(metric)])
        table = markdown_table(["metric", "value [95 % interval]", "reports"], rows)
        drawn = max((metric.clusters for metric in self.metrics.values()), default=0)
        lines = [
            f"{self.label}",
            "",
            table,
            "",
            f"95 % intervals from a bootstrap of {drawn} {self.clusters}; for BLEU and the finding metrics it "
            "resamples the counts and recomputes the corpus score.",
        ]
        if drawn < MIN_RELIABLE_CLUSTERS:
            lines[-1] += f" Below {MIN_RELIABLE_CLUSTERS} they are approximate."
        lines += [f"- {name}: {by}" for name, by in self.by.items()]
        if "r2gen" in self.by and set(self.views) != {2}:
            views = ", ".join(f"{n} from {count or 'an unknown number of'} views" for count, n in self.views.items())
            lines.append(f"- r2gen covers the preparation of the text only: R2Gen's models see 2 views ({views})")
        lines += [f"- absent: {name}: {reason}" for name, reason in self.absent.items()]
        return "\n".join([*lines, NOT_CLINICAL_NOTE])


def score_reports(  # noqa: PLR0913  one argument for each option of `clincot report-metrics`
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
    """Score the generated reports (a reports.jsonl) study by study.

    training: the training reports, for the r2gen protocol. studies: a studies.jsonl that names the patients; the
    bootstrap is then clustered by patient instead of study. A reference without a generated report counts as unscored
    in every metric. Raises InvalidRecord on a generated report without a reference, an empty reference or an unknown
    study, and if the references are empty.
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
        report = texts.pop(row.study, None)
        metrics.add_report(sums, None if report is None else report.text, row.text, patients.get(row.study, row.study))
        if report is not None:
            views[report.views] = views.get(report.views, 0) + 1
    if texts:
        raise InvalidRecord(
            f"{generated}: {len(texts)} reports are of studies without a reference in {references}, "
            f"for instance {next(iter(texts))!r}"
        )
    if not sums:
        raise InvalidRecord(f"{references}: expected reference reports, found none")
    return ReportScores(
        label=label or f"report-text metrics on {references}",
        metrics={name: metric.compute_interval(seed=seed, resamples=resamples) for name, metric in sums.items()},
        by=metrics.by,
        absent=metrics.absent,
        clusters="studies" if studies is None else "patients",
        views=dict(sorted(views.items())),
    )


def write_scores(path: Path, scores: ReportScores) -> None:
    """Write the scores as a JSON file."""
    write_json(path, scores.as_json())


def _require_text(rows: Iterable[ReportRow], path: Path) -> Iterable[ReportRow]:
    """Pass the references on; raises InvalidRecord on an empty one, which no text could match."""
    for row in rows:
        if not row.text.strip():
            raise InvalidRecord(f"{path}: the reference report of study {row.study!r} is empty; leave the study out")
        yield row


def _format_counts(metric: Interval) -> str:
    return f"{metric.n}" + (f", {metric.n_unscored} unscored" if metric.n_unscored else "")
