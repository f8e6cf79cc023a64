"""Reader of a benchmark folder, and the report metrics that its questions need."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from clincot.datasets.reports import read_reports

if TYPE_CHECKING:
    from clincot.evaluation.benchmark import Benchmark
    from clincot.evaluation.report_text.report_scorer import ReportMetrics


def read_benchmark(folder: Path, *, limit: int = 0, only: Iterable[str] | None = None) -> Benchmark:
    """Read questions with their answer key: those with an id in `only` (None: all), cut to `limit` (0: no limit).

    Raises InvalidRecord on a malformed file and BadBenchmark on files that do not match.
    """
    from clincot.datasets.folder import StudyIndex, iter_single_image, load_questions, load_references
    from clincot.evaluation.benchmark import Benchmark

    wanted = None if only is None else set(only)
    questions = [q for q in load_questions(folder) if wanted is None or q.id in wanted]
    questions = questions[: limit or None]
    ids = {q.id for q in questions}
    questions = list(iter_single_image(questions))
    references = [r for r in load_references(folder) if r.question in ids]
    return Benchmark.from_records(questions, references, StudyIndex(folder).values())


def select_report_metrics(benchmark: Benchmark, training: Path | None) -> ReportMetrics | None:
    """Build the report metrics of a benchmark; None if none of its questions asks for a report.

    training: a reports.jsonl from which the r2gen protocol takes its vocabulary; None leaves that protocol out.
    """
    from clincot.evaluation.report_text.report_scorer import build_report_metrics

    if all(question.kind != "report" for question in benchmark.questions.values()):
        return None
    return build_report_metrics(None if training is None else (row.text for row in read_reports(training)))
