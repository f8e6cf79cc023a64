"""Benchmark reports: metrics with intervals computed from outcomes, and their table.

All protocols are reported by name: both of vqa.py and the one of parsed_answers.py. Every metric of an arm counts each
question that it applies to either as scored (n) or as unscored (n_unscored). A question that an arm did not answer at
all is unscored, so a run that stopped half way cannot look complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from clincot.datasets.closed_answers import read_polarity
from clincot.evaluation import blind_baseline
from clincot.evaluation.answer_protocols import AnswerProtocol, choose_headline, grade_by_panel
from clincot.evaluation.benchmark import BadBenchmark, Benchmark
from clincot.evaluation.intervals import MIN_RELIABLE_CLUSTERS, MetricSums, add_mean
from clincot.evaluation.parsed_answers import can_parse, grade_parsed
from clincot.evaluation.report_text.report_scorer import REPORT_METRIC_HEADINGS as REPORT_HEADINGS
from clincot.evaluation.report_text.report_scorer import ReportMetrics
from clincot.evaluation.vqa import answer_length, says_yes, score_llava_med_closed, score_llava_med_open, token_set_f1
from clincot.records import BenchmarkReport, Interval, Outcome, Question, Reference
from clincot.text import format_interval, markdown_table

VQA_PROTOCOL = "strict, llava-med and parsed"
PRESENCE_TOPICS = frozenset({"presence", "pres"})  # our topic, and VQA-RAD's question type
# Columns of the table in this order; the heading names the protocol.
METRIC_HEADINGS = {
    "accuracy": "accuracy (strict)",
    "closed_accuracy": "closed (strict)",
    "open_accuracy": "open (strict)",
    "choice_accuracy": "choice",
    "token_f1": "token F1 (strict)",
    "llava_med_closed_accuracy": "closed (llava-med)",
    "llava_med_open_recall": "open recall (llava-med)",
    "parsed_accuracy": "accuracy (parsed)",
    "panel_open_accuracy": "open (panel)",
    "panel_agreement": "panel agrees with exact match",
    "hit_rate": "region hit-rate",
    "iou": "region IoU",
    "hallucination": "hallucination",
    "off_format": "off format",
    "answer_length": "answer words",
    **REPORT_HEADINGS,
}

# Metrics that stand for a whole report in one line of figures: {metric: its name there}.
_HEADLINE_METRICS = {"accuracy": "accuracy", "raw/rouge_l": "rouge_l", "finding_f1": "finding_f1"}

_ALL_QUESTION_METRICS = ("accuracy", "report_words")  # one of these counts every question of an arm


@dataclass
class _ArmSums:
    """The sums over one policy's outcomes, by arm. `reports`: needed if questions ask for reports."""

    reports: ReportMetrics | None
    arms: dict[str, MetricSums] = field(default_factory=dict)
    answered: dict[str, set[str]] = field(default_factory=dict)  # {arm: questions of this run with an outcome}

    def add_outcome(self, outcome: Outcome, benchmark: Benchmark) -> None:
        """Count an outcome; raises BadBenchmark if it is not one of the benchmark's, or repeated."""
        _check_outcome(outcome, benchmark)
        answered = self.answered.setdefault(outcome.arm, set())
        if outcome.question in answered:
            raise BadBenchmark(
                f"question {outcome.question} has two outcomes of policy {outcome.policy} in arm {outcome.arm!r}"
            )
        answered.add(outcome.question)
        sums = self.arms.setdefault(outcome.arm, {})
        _count_outcome(sums, outcome.question, outcome, benchmark, self.reports, arm=outcome.arm)

    def end_run(self, benchmark: Benchmark) -> None:
        """Count as unscored every question that an arm of this run did not answer; another run may follow."""
        for arm, answered in self.answered.items():
            for question in benchmark.questions:
                if question not in answered:
                    _count_outcome(self.arms[arm], question, None, benchmark, self.reports, arm=arm)
        self.answered = {}

    def compute_intervals(self, *, seed: int, resamples: int) -> dict[str, dict[str, Interval]]:
        """{arm: {metric: mean with its interval}}."""
        intervals = {}
        for arm, sums in self.arms.items():
            intervals[arm] = {n: metric.compute_interval(seed=seed, resamples=resamples) for n, metric in sums.items()}
        return intervals


def build_benchmark_reports(
    outcomes: Iterable[Outcome],
    benchmark: Benchmark,
    *,
    reports: ReportMetrics | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> list[BenchmarkReport]:
    """Build one report for each policy; policies and arms keep their order of appearance.

    The outcomes are streamed and not kept in memory. Each metric of an arm is a mean over questions with its 95 %
    interval, clustered by patient:

    - accuracy, accuracy/<topic>, closed_accuracy, open_accuracy, choice_accuracy, token_f1 (strict protocol);
    - llava_med_closed_accuracy, llava_med_open_recall (llava-med protocol);
    - parsed_accuracy (parsed protocol): questions whose reference it reads; an answer without a commitment is unscored;
    - panel_open_accuracy: open answers that a panel with the reference at hand calls right; panel_agreement: the share
      of them on which it agrees with exact match;
    - hit_rate, iou: questions with reference boxes, in every arm but the blind one;
    - hallucination: share of "yes" among presence questions about an absent finding;
    - off_format, answer_length (words).

    Questions that ask for a report have the metrics of `reports`, hit_rate, iou and off_format instead. A metric that
    applies to no question is absent. Raises BadBenchmark on an empty benchmark, an unknown or repeated question, an
    outcome scored with another answer key, or questions that ask for a report if `reports` is None.
    """
    if not benchmark.questions:
        raise BadBenchmark("the benchmark has no questions; there is nothing to report")
    kinds: set[str] = {question.kind for question in benchmark.questions.values()}
    if "report" in kinds and reports is None:
        raise BadBenchmark("questions of the benchmark ask for reports, but no report metrics were passed")
    policies: dict[str, _ArmSums] = {}
    for outcome in outcomes:
        policies.setdefault(outcome.policy, _ArmSums(reports)).add_outcome(outcome, benchmark)
    built = []
    for policy, sums in policies.items():
        sums.end_run(benchmark)
        metrics = sums.compute_intervals(seed=seed, resamples=resamples)
        protocol = _describe_protocol(kinds, reports)
        built.append(BenchmarkReport(benchmark=benchmark.digest, policy=policy, protocol=protocol, metrics=metrics))
    return built


def pool_metrics(
    runs: Sequence[tuple[Iterable[Outcome], Benchmark]],
    *,
    reports: ReportMetrics | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, dict[str, Interval]]:
    """The metrics of a report over several runs of one method together: {arm: {metric: interval}}.

    runs: the outcomes of each run's policy and the benchmark that it answered. A patient is one cluster in all runs.
    Raises BadBenchmark as `build_benchmark_reports` does.
    """
    sums = _ArmSums(reports)
    for outcomes, benchmark in runs:
        for outcome in outcomes:
            sums.add_outcome(outcome, benchmark)
        sums.end_run(benchmark)
    return sums.compute_intervals(seed=seed, resamples=resamples)


def _describe_protocol(kinds: set[str], reports: ReportMetrics | None) -> str:
    """Name the protocols of the benchmark's kinds of questions; for reports, what computes each metric."""
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
    arm: str,
) -> None:
    question, reference = benchmark.questions[question_id], benchmark.references[question_id]
    cluster = benchmark.clusters[question_id]
    if question.kind == "report":
        assert reports is not None
        reports.add_report(sums, None if outcome is None else outcome.answer, reference.answer, cluster)
    else:
        for name, value in iter_answer_metrics(question, reference, outcome):
            add_mean(sums, name, value, cluster, share=name != "answer_length")
    if reference.boxes and arm != blind_baseline.BLIND_ARM:
        add_mean(sums, "hit_rate", None if outcome is None else outcome.hit, cluster, share=True)
        add_mean(sums, "iou", None if outcome is None else outcome.iou, cluster, share=True)
    add_mean(sums, "off_format", None if outcome is None else outcome.off_format, cluster, share=True)


def iter_answer_metrics(
    question: Question, reference: Reference, outcome: Outcome | None
) -> Iterator[tuple[str, float | None]]:
    """Yield every answer metric that applies to the question with its value; None without a readable outcome."""
    read = outcome is not None and outcome.correct is not None
    answer = outcome.answer if outcome is not None and read else None

    correct = None if outcome is None else outcome.correct
    yield "accuracy", correct
    yield f"{question.kind}_accuracy", correct
    if question.topic:
        yield f"accuracy/{question.topic}", correct
    if question.kind != "choice":  # which may be answered by a letter
        yield "token_f1", None if answer is None else token_set_f1(answer, reference.answer)
    if question.kind == "closed":
        hit = None if answer is None else score_llava_med_closed(answer, reference.answer)
        yield "llava_med_closed_accuracy", hit
    elif question.kind == "open":
        recall = None if answer is None else score_llava_med_open(answer, reference.answer).recall
        yield "llava_med_open_recall", recall
    if question.kind != "choice" and can_parse(question.text, reference.answer):
        yield "parsed_accuracy", None if answer is None else grade_parsed(answer, question.text, reference.answer)
    if outcome is not None and outcome.graders:
        right = grade_by_panel(outcome)
        yield "panel_open_accuracy", right
        yield "panel_agreement", None if right is None else right == float(outcome.correct or False)
    if asks_about_absent_finding(question, reference):
        yield "hallucination", None if answer is None else says_yes(answer)
    yield "answer_length", None if answer is None else answer_length(answer)


def grade_arm(outcomes: Iterable[Outcome], arm: str, metric: str, benchmark: Benchmark) -> dict[str, float | None]:
    """{question: metric} of an arm's answers, for the questions to which a metric of answers applies."""
    grades: dict[str, float | None] = {}
    for outcome in outcomes:
        question, reference = benchmark.questions[outcome.question], benchmark.references[outcome.question]
        if outcome.arm != arm or question.kind == "report":
            continue
        values = dict(iter_answer_metrics(question, reference, outcome))
        if metric in values:
            value = values[metric]
            grades[outcome.question] = None if value is None else float(value)
    return grades


def asks_about_absent_finding(question: Question, reference: Reference) -> bool:
    """Whether a closed presence question is about a finding that the answer key says is absent."""
    return (
        question.kind == "closed"
        and question.topic.lower() in PRESENCE_TOPICS
        and read_polarity(reference.answer) == "no"
    )


def render_metrics_table(
    reports: Sequence[BenchmarkReport],
    *,
    names: Mapping[str, str] | None = None,
    metrics: Sequence[str] | None = None,
) -> str:
    """Render a Markdown table that also reads well in a terminal, with one row for each policy and arm.

    names: {policy digest: row name}. metrics: the columns (default: those of METRIC_HEADINGS that any report has). A
    cell shows its own counts if they differ from the counts of the row's accuracy. Raises BadBenchmark on reports of
    different benchmarks, because rows over different questions cannot be compared.
    """
    benchmarks = sorted({report.benchmark for report in reports})
    if len(benchmarks) != 1:
        raise BadBenchmark(f"a table shows one benchmark, got reports of {len(benchmarks)}: {', '.join(benchmarks)}")
    present: set[str] = set()
    for report in reports:
        present.update(*report.metrics.values())
    columns = [name for name in METRIC_HEADINGS if name in present] if metrics is None else list(metrics)
    head = ["policy", "region", "n", *(METRIC_HEADINGS.get(name, name) for name in columns)]
    rows = []
    for report in reports:
        for arm, values in report.metrics.items():
            whole = next((values[name] for name in _ALL_QUESTION_METRICS if name in values), None)
            policy = (names or {}).get(report.policy, report.policy[:16])
            cells = [_format_cell(values.get(name), whole) for name in columns]
            rows.append([policy, arm, _format_counts(whole), *cells])
    return markdown_table(head, rows, layout="aligned") + "\n\n" + _format_footnote(reports)


def _format_cell(interval: Interval | None, whole: Interval | None) -> str:
    if interval is None:
        return "–"
    same = whole is not None and (interval.n, interval.n_unscored) == (whole.n, whole.n_unscored)
    counts = "" if same else f" ({_format_counts(interval)})"
    return f"{format_interval(interval)}{counts}"


def _format_counts(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{interval.n}" + (f", {interval.n_unscored} unscored" if interval.n_unscored else "")


def _format_footnote(reports: Sequence[BenchmarkReport]) -> str:
    clusters: set[int] = set()
    for report in reports:
        for metrics in report.metrics.values():
            clusters.update(metric.clusters for metric in metrics.values() if metric.n)
    fewest, most = min(clusters, default=0), max(clusters, default=0)
    note = describe_clusters(fewest, most)
    if not any(blind_baseline.BLIND_ARM in report.metrics for report in reports):
        note += " The blind baseline is not in this table."
    return note


def describe_clusters(fewest: int, most: int) -> str:
    """Say on how many patients the intervals of a table rest, and whether these are few."""
    patients = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    note = f"95 % intervals clustered by patient ({patients} patients)."
    return note + (f" Below {MIN_RELIABLE_CLUSTERS} patients they are approximate." * (fewest < MIN_RELIABLE_CLUSTERS))


def list_headline_figures(report: BenchmarkReport, protocol: AnswerProtocol = "strict") -> dict[str, float]:
    """Return the main figures of a report: {<metric>_<arm>: value}; that of the recipe's protocol is among them."""
    figures = {}
    for arm, intervals in report.metrics.items():
        headline = choose_headline(protocol, intervals)
        for name, label in ({headline: headline} | _HEADLINE_METRICS).items():
            if name in intervals and (value := intervals[name].value) is not None:
                figures[f"{label}_{arm}"] = value
    return figures
