"""The results of a comparison: every policy's metrics over all seeds, and the table with the published rows.

A policy that was not measured stays in the table, and the notes below name it with the file that is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clincot.comparison.comparison_plan import ComparisonPlan
from clincot.comparison.published_rows import WARNING, find_published_rows, render_published_rows
from clincot.datasets.folder import load_questions, load_references
from clincot.datasets.reports import REPORTS_FILE
from clincot.evaluation.answer_protocols import choose_headline
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.benchmark_report import METRIC_HEADINGS, describe_clusters, grade_arm, pool_metrics
from clincot.evaluation.blind_baseline import BLIND_ARM, BlindBaseline
from clincot.evaluation.intervals import paired_difference
from clincot.evaluation.read_benchmark import read_benchmark, select_report_metrics
from clincot.jsonl import atomic_write, read_records, write_json
from clincot.records import Interval, Outcome
from clincot.reporting.results_table import ARM_LABELS, ResultsRow, ResultsTable, render_table
from clincot.rounds import run_rounds
from clincot.text import format_count, format_interval

RESULTS_FILE, TABLE_FILE = "comparison.json", "comparison.md"
CONTROLS = ("random", "wrong", "oracle", "shuffled", "whole")
_FURTHER = ("hit_rate", "off_format", "answer_length")


@dataclass(frozen=True)
class MeasuredPolicy:
    """A row: the pooled metrics of every arm, and the paired difference to the base in each arm."""

    row: str
    metrics: Mapping[str, Mapping[str, Interval]]
    gain: Mapping[str, Interval]
    missing: tuple[str, ...] = ()  # files that do not exist


def run_comparison(plan: ComparisonPlan) -> dict[str, Any]:
    """Run the plan, or resume it; write and return its results. Raises InvalidInput for a plan that cannot work."""
    plan.check()
    for seed in plan.seeds:
        run_rounds(plan.build_seed_plan(seed))
    return collect_comparison(plan)


def collect_comparison(plan: ComparisonPlan) -> dict[str, Any]:
    """Collect what the runs have so far, write comparison.json and comparison.md, and return the former's content."""
    benchmark = read_benchmark(plan.benchmark, limit=plan.params.evaluate.limit)
    training = plan.data / REPORTS_FILE
    reports = select_report_metrics(benchmark, training if training.is_file() else None)
    config = plan.params.evaluate
    options: dict[str, Any] = {"reports": reports, "seed": config.seed, "resamples": config.resamples}
    metric = choose_metric(plan, benchmark)
    base = _read_seeds(plan, "base")
    policies = []
    for row, folder in plan.list_policies().items():
        runs = _read_seeds(plan, folder)
        absent = tuple(str(path) for path, outcomes in runs if not outcomes)
        complete = [outcomes for _, outcomes in runs if outcomes]
        if absent or not complete:
            policies.append(MeasuredPolicy(row, {}, {}, absent))
            continue
        metrics = pool_metrics([(outcomes, benchmark) for outcomes in complete], **options)
        gain = {} if folder == "base" else dict(_iter_gains(plan, benchmark, metric, complete, [o for _, o in base]))
        policies.append(MeasuredPolicy(row, metrics, gain))
    blind = BlindBaseline.fit(load_questions(plan.data), load_references(plan.data))
    blind_metrics = pool_metrics([(list(blind.iter_outcomes(benchmark)), benchmark)], **options)[BLIND_ARM]
    results = _describe_results(plan, benchmark, metric, policies, blind_metrics)
    text = _render_comparison(plan, metric, policies, blind_metrics, results)
    plan.run.mkdir(parents=True, exist_ok=True)
    write_json(plan.run / RESULTS_FILE, results)
    with atomic_write(plan.run / TABLE_FILE) as file:
        file.write(text + "\n")
    return results


def choose_metric(plan: ComparisonPlan, benchmark: Benchmark) -> str:
    """The metric of the table's arms: ROUGE-L for a benchmark of reports, else accuracy by the gate's protocol."""
    if all(question.kind == "report" for question in benchmark.questions.values()):
        return "raw/rouge_l"
    protocol = plan.params.decide.protocol
    return "accuracy" if protocol == "llava-med" else choose_headline(protocol, METRIC_HEADINGS)


def _read_seeds(plan: ComparisonPlan, folder: str) -> list[tuple[Path, list[Outcome]]]:
    """(file, its outcomes) of a policy in every seed's run; a file that does not exist has none."""
    paths = [plan.find_seed_folder(seed) / folder / "outcomes.jsonl" for seed in plan.seeds]
    return [(path, list(read_records(path, Outcome)) if path.is_file() else []) for path in paths]


def _iter_gains(
    plan: ComparisonPlan,
    benchmark: Benchmark,
    metric: str,
    runs: Sequence[Sequence[Outcome]],
    base: Sequence[Sequence[Outcome]],
) -> Iterator[tuple[str, Interval]]:
    """Yield (arm, difference to the base), paired by question and seed and clustered by patient."""
    config = plan.params.evaluate
    for arm in config.arms:
        ours: list[float | None] = []
        theirs: list[float | None] = []
        clusters: list[str] = []
        for mine, other in zip(runs, base, strict=True):
            scored, before = grade_arm(mine, arm, metric, benchmark), grade_arm(other, arm, metric, benchmark)
            for question, cluster in benchmark.clusters.items():
                if question in scored and question in before:
                    ours.append(scored[question])
                    theirs.append(before[question])
                    clusters.append(cluster)
        if clusters:
            yield (
                arm,
                paired_difference(ours, theirs, clusters, seed=config.seed, resamples=config.resamples),
            )


def _describe_results(
    plan: ComparisonPlan,
    benchmark: Benchmark,
    metric: str,
    policies: Sequence[MeasuredPolicy],
    blind: Mapping[str, Interval],
) -> dict[str, Any]:
    """The content of comparison.json."""
    rows = []
    for policy in policies:
        arms = {arm: _dump_intervals(metrics) for arm, metrics in policy.metrics.items()}
        row = {"row": policy.row, "missing": list(policy.missing), "arms": arms, "gain": _dump_intervals(policy.gain)}
        rows.append(row)
    published = find_published_rows(plan.facts.title if plan.facts else "", plan.set_name)
    return {
        "recipe": plan.params.describe_recipe(),
        "seeds": list(plan.seeds),
        "rounds": plan.rounds,
        "benchmark": benchmark.digest,
        "metric": metric,
        "arm": plan.params.decide.arm,
        "rows": rows,
        "blind": _dump_intervals(blind),
        "missing": list(_list_missing(plan, policies)),
        "published": [vars(row) for row in published],
        "warning": WARNING,
    }


def _dump_intervals(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: interval.model_dump(mode="json") for name, interval in intervals.items()}


def _list_missing(plan: ComparisonPlan, policies: Sequence[MeasuredPolicy]) -> Iterator[str]:
    """A sentence for every policy that was not measured and every control that the recipe leaves out."""
    for policy in policies:
        if policy.missing:
            yield f"{policy.row} was not measured: {', '.join(policy.missing)} does not exist. Run the command again."
    for arm in CONTROLS:
        if arm not in plan.params.evaluate.arms:
            yield f"The control {arm} ({ARM_LABELS[arm]}) was not measured: evaluate.arms does not have it."


def _render_comparison(
    plan: ComparisonPlan,
    metric: str,
    policies: Sequence[MeasuredPolicy],
    blind: Mapping[str, Interval],
    results: Mapping[str, Any],
) -> str:
    """The table, the notes and the published rows, as Markdown."""
    arms, decided = plan.params.evaluate.arms, plan.params.decide.arm
    label = METRIC_HEADINGS.get(metric, metric)
    further = [f"minus base ({ARM_LABELS.get(decided, decided)})", "region hit-rate", "off format", "answer words"]
    rows = []
    for policy in policies:
        own = policy.metrics.get(decided, {})
        cells = [format_interval(policy.gain.get(decided), signed=True)]
        cells += [format_interval(own.get(name)) for name in _FURTHER]
        values = {arm: metrics.get(metric) for arm, metrics in policy.metrics.items()}
        rows.append(ResultsRow(policy.row, values, cells, missing=not policy.metrics))
    table = render_table(ResultsTable(label, arms, rows, blind.get(metric), further))
    parts = [table, _describe_measurement(plan, policies), *[f"**Missing.** {line}" for line in results["missing"]]]
    published = find_published_rows(plan.facts.title if plan.facts else "", plan.set_name)
    if published:
        parts += [render_published_rows(published), WARNING]
    else:
        parts.append("Published rows: none are known for this policy and data set.")
    return "\n\n".join(parts)


def _describe_measurement(plan: ComparisonPlan, policies: Sequence[MeasuredPolicy]) -> str:
    """One paragraph on seeds, questions, patients and intervals."""
    seeds = f"{format_count(len(plan.seeds), 'seed')} ({', '.join(map(str, plan.seeds))})"
    patients = 0
    for policy in policies:
        for metrics in policy.metrics.values():
            patients = max(patients, *(interval.clusters for interval in metrics.values()))
    note = f"{seeds}, {format_count(plan.rounds, 'round')}; {describe_clusters(patients, patients)}"
    return note + " The blind baseline knows the answers of the training questions and sees no image."


def read_table(run: Path) -> str:
    """The table of a comparison, as comparison.md has it."""
    return (run / TABLE_FILE).read_text(encoding="utf-8").rstrip("\n")
