"""From outcomes to metrics with intervals, and to the table a reader sees.

Both protocols of clincot.evaluation.vqa are reported by name. Every metric of an arm counts each question it applies to
either as scored (n) or as unscored (n_unscored): a question that an arm did not answer at all is unscored, so a run
that stopped half way cannot look complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from clincot.evaluation import blind_baseline
from clincot.evaluation.benchmark import BadBenchmark, Benchmark
from clincot.evaluation.intervals import MIN_RELIABLE_CLUSTERS, MetricSums, add_mean
from clincot.evaluation.report_text.report_scorer import REPORT_METRIC_HEADINGS as REPORT_HEADINGS
from clincot.evaluation.report_text.report_scorer import ReportMetrics
from clincot.evaluation.vqa import answer_length, says_yes, score_llava_med_closed, score_llava_med_open, token_set_f1
from clincot.records import BenchmarkReport, Interval, Outcome, Question, Reference
from clincot.text import normalize_text

VQA_PROTOCOL = "strict and llava-med"
PRESENCE_TOPICS = frozenset({"presence", "pres"})  # ours, and VQA-RAD's question type
# What the table shows, in this order, with the protocol in the heading.
METRIC_HEADINGS = {
    "accuracy": "accuracy (strict)",
    "closed_accuracy": "closed (strict)",
    "open_accuracy": "open (strict)",
    "token_f1": "token F1 (strict)",
    "llava_med_closed_accuracy": "closed (llava-med)",
    "llava_med_open_recall": "open recall (llava-med)",
    "hit_rate": "region hit-rate",
    "iou": "region IoU",
    "hallucination": "hallucination",
    "off_format": "off format",
    "answer_length": "answer words",
    **REPORT_HEADINGS,
}

_ALL_QUESTION_METRICS = ("accuracy", "report_words")  # one of these counts every question of an arm


def build_benchmark_reports(
    outcomes: Iterable[Outcome],
    benchmark: Benchmark,
    *,
    reports: ReportMetrics | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> list[BenchmarkReport]:
    """One report a policy, policies and arms in order of appearance; outcomes are streamed, not kept.

    Metrics of an arm, each the mean over questions with a 95 % interval clustered by patient:
    accuracy, accuracy/<topic>, closed_accuracy, open_accuracy, token_f1 (strict protocol); llava_med_closed_accuracy,
    llava_med_open_recall; hit_rate and iou (questions with reference boxes, arms that look); hallucination (presence
    questions about an absent finding: share answered yes); off_format; answer_length (words). Questions that
    ask for a report have the metrics of `reports` instead, and hit_rate, iou and off_format. A metric that applies to
    no question is absent. Raises BadBenchmark on an empty benchmark, an unknown or repeated question, an outcome scored
    with another answer key, or a question that asks for a report without `reports`.
    """
    if not benchmark.questions:
        raise BadBenchmark("the benchmark has no questions; there is nothing to report")
    kinds: set[str] = {question.kind for question in benchmark.questions.values()}
    if "report" in kinds and reports is None:
        raise BadBenchmark("questions of the benchmark ask for reports, and no metrics of reports were given")
    policies: dict[str, dict[str, MetricSums]] = {}
    answered: dict[tuple[str, str], set[str]] = {}
    for outcome in outcomes:
        _check_outcome(outcome, benchmark)
        seen = answered.setdefault((outcome.policy, outcome.arm), set())
        if outcome.question in seen:
            raise BadBenchmark(
                f"question {outcome.question} has two outcomes of policy {outcome.policy} in arm {outcome.arm!r}"
            )
        seen.add(outcome.question)
        sums = policies.setdefault(outcome.policy, {}).setdefault(outcome.arm, {})
        _count_outcome(
            sums, outcome.question, outcome, benchmark, reports, looks=outcome.arm != blind_baseline.BLIND_ARM
        )
    for (policy, arm), seen in answered.items():
        for question in benchmark.questions:
            if question not in seen:
                _count_outcome(
                    policies[policy][arm], question, None, benchmark, reports, looks=arm != blind_baseline.BLIND_ARM
                )
    return [
        BenchmarkReport(
            benchmark=benchmark.digest,
            policy=policy,
            protocol=_describe_protocol(kinds, reports),
            metrics={
                arm: {name: metric.compute_interval(seed=seed, resamples=resamples) for name, metric in sums.items()}
                for arm, sums in arms.items()
            },
        )
        for policy, arms in policies.items()
    ]


def _describe_protocol(kinds: set[str], reports: ReportMetrics | None) -> str:
    """The protocols of the kinds of questions there are; of reports, by what each metric is computed."""
    parts = [VQA_PROTOCOL] if kinds - {"report"} else []
    return "; ".join([*parts, reports.describe_metrics()] if "report" in kinds and reports is not None else parts)


def _check_outcome(outcome: Outcome, benchmark: Benchmark) -> None:
    reference = benchmark.references.get(outcome.question)
    if reference is None:
        raise BadBenchmark(f"outcome {outcome.id} is of question {outcome.question}, not one of this benchmark")
    if outcome.reference != reference.id:
        raise BadBenchmark(
            f"outcome {outcome.id} was scored with reference {outcome.reference}; the answer key has {reference.id}"
        )


def _count_outcome(
    sums: MetricSums,
    question_id: str,
    outcome: Outcome | None,
    benchmark: Benchmark,
    reports: ReportMetrics | None,
    *,
    looks: bool,
) -> None:
    question, reference = benchmark.questions[question_id], benchmark.references[question_id]
    cluster = benchmark.clusters[question_id]
    if question.kind == "report":
        assert reports is not None
        reports.add_report(sums, None if outcome is None else outcome.answer, reference.answer, cluster)
    else:
        for name, value in _iter_metric_values(question, reference, outcome):
            add_mean(sums, name, value, cluster, share=name != "answer_length")
    if reference.boxes and looks:
        add_mean(sums, "hit_rate", None if outcome is None else outcome.hit, cluster, share=True)
        add_mean(sums, "iou", None if outcome is None else outcome.iou, cluster, share=True)
    add_mean(sums, "off_format", None if outcome is None else outcome.off_format, cluster, share=True)


def _iter_metric_values(
    question: Question, reference: Reference, outcome: Outcome | None
) -> Iterator[tuple[str, float | None]]:
    """Every metric of its answer that applies to the question, with its value; None without a (readable) outcome."""
    read = outcome is not None and outcome.correct is not None
    answer = outcome.answer if outcome is not None and read else None

    correct = None if outcome is None else outcome.correct
    yield "accuracy", correct
    yield f"{question.kind}_accuracy", correct
    if question.topic:
        yield f"accuracy/{question.topic}", correct
    yield "token_f1", None if answer is None else token_set_f1(answer, reference.answer)
    if question.kind == "closed":
        hit = None if answer is None else score_llava_med_closed(answer, reference.answer)
        yield "llava_med_closed_accuracy", hit
    else:
        recall = None if answer is None else score_llava_med_open(answer, reference.answer).recall
        yield "llava_med_open_recall", recall
    if asks_about_absent_finding(question, reference):
        yield "hallucination", None if answer is None else says_yes(answer)
    yield "answer_length", None if answer is None else answer_length(answer)


def asks_about_absent_finding(question: Question, reference: Reference) -> bool:
    return (
        question.kind == "closed"
        and question.topic.lower() in PRESENCE_TOPICS
        and normalize_text(reference.answer) == "no"
    )


def render_metrics_table(
    reports: Sequence[BenchmarkReport],
    *,
    names: Mapping[str, str] | None = None,
    metrics: Sequence[str] | None = None,
) -> str:
    """A Markdown table that also reads well in a terminal: one row a policy and arm, value [low, high] a metric.

    names: {policy digest: row name}. metrics: columns (default: those of HEADINGS that any report has). A column
    with other counts than the row's accuracy shows its own. Raises BadBenchmark on reports of different benchmarks,
    as rows over different questions cannot be compared.
    """
    benchmarks = sorted({report.benchmark for report in reports})
    if len(benchmarks) != 1:
        raise BadBenchmark(f"a table shows one benchmark, got reports of {len(benchmarks)}: {', '.join(benchmarks)}")
    present = {name for report in reports for arm in report.metrics.values() for name in arm}
    columns = [name for name in METRIC_HEADINGS if name in present] if metrics is None else list(metrics)
    rows = [["policy", "region", "n", *(METRIC_HEADINGS.get(name, name) for name in columns)]]
    for report in reports:
        for arm, values in report.metrics.items():
            whole = next((values[name] for name in _ALL_QUESTION_METRICS if name in values), None)
            policy = (names or {}).get(report.policy, report.policy[:16])
            cells = [_format_cell(values.get(name), whole) for name in columns]
            rows.append([policy, arm, _format_counts(whole), *cells])
    return _format_markdown_table(rows) + "\n\n" + _format_footnote(reports)


def _format_cell(interval: Interval | None, whole: Interval | None) -> str:
    if interval is None:
        return "–"
    same = whole is not None and (interval.n, interval.n_unscored) == (whole.n, whole.n_unscored)
    counts = "" if same else f" ({_format_counts(interval)})"
    if interval.value is None:
        return f"–{counts}"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.3f}{counts}"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]{counts}"


def _format_counts(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{interval.n}" + (f", {interval.n_unscored} unscored" if interval.n_unscored else "")


def _format_footnote(reports: Sequence[BenchmarkReport]) -> str:
    scored = [metric for report in reports for arm in report.metrics.values() for metric in arm.values() if metric.n]
    fewest = min((metric.clusters for metric in scored), default=0)
    most = max((metric.clusters for metric in scored), default=0)
    patients = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    note = f"95 % intervals clustered by patient ({patients} patients)."
    if fewest < MIN_RELIABLE_CLUSTERS:
        note += f" Below {MIN_RELIABLE_CLUSTERS} patients they are approximate."
    if not any(blind_baseline.BLIND_ARM in report.metrics for report in reports):
        note += " The blind baseline is not in this table."
    return note


def _format_markdown_table(rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in escaped) for column in range(len(escaped[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in escaped]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
