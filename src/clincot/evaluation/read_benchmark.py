"""Reading a benchmark: questions with their answer key, and the metrics their kind needs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from clincot.datasets.reports import read_reports

if TYPE_CHECKING:
    from clincot.evaluation.benchmark import Benchmark
    from clincot.evaluation.report_text.report_scorer import ReportMetrics


def read_benchmark(folder: Path, *, limit: int = 0, only: Iterable[str] | None = None) -> Benchmark:
    """Questions with their answer key, cut to the first `limit` or to the ids in `only`."""
    from clincot.datasets.folder import StudyIndex, load_questions, load_references
    from clincot.evaluation.benchmark import Benchmark

    kept = None if only is None else set(only)
    questions = [q for q in load_questions(folder) if kept is None or q.id in kept]
    questions = questions[: limit or None]
    ids = {q.id for q in questions}
    references = [r for r in load_references(folder) if r.question in ids]
    return Benchmark.from_records(questions, references, StudyIndex(folder).values())


def select_report_metrics(benchmark: Benchmark, training: Path | None) -> ReportMetrics | None:
    """What scores the benchmark's reports; None where it asks for none. training: reports.jsonl, R2Gen's vocabulary."""
    from clincot.evaluation.report_text.report_scorer import build_report_metrics

    if all(question.kind != "report" for question in benchmark.questions.values()):
        return None
    return build_report_metrics(None if training is None else (row.text for row in read_reports(training)))
